"""A synthetic S3 server on loopback: a process of its own that waits so long with each request, and counts them.

    python -m benchmarks.scale_server FOLDER [--delay-ms 30] [--minutes 120]

Serves the files of FOLDER as the objects of the bucket `bucket`; what is put stays in memory and FOLDER as it is. It
speaks what the client of object stores asks for: GET with ranges, HEAD, lists by pages of 1000 keys, PUT (also
If-None-Match: * and copies), multipart uploads and DELETE. `/_counts` tells requests by kind, and bytes of bodies that
were sent, in all and by the first part of the key; `/_counts?reset` begins anew. The first line that is printed is the
URL. It ends with the process that started it, or when its time is up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import email.utils
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from benchmarks.scale_objects import Objects, counts_text

BUCKET = "bucket"
PAGE_KEYS = 1000
WATCH_SECONDS = 0.5
ROOT = Path(__file__).resolve().parents[1]
_KEY = re.compile(rb"<Key>(.*?)</Key>", re.DOTALL)
_REASONS = {200: "OK", 204: "No Content", 206: "Partial Content", 404: "Not Found", 412: "Precondition Failed"}


@dataclass(frozen=True)
class Request:
    """One request: its verb, key, query, headers in lower case, and body."""

    verb: str
    key: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes

    def asks(self, name: str) -> str | None:
        return self.query[name][0] if name in self.query else None


@dataclass(frozen=True)
class Answer:
    """Status, body and headers; `length` where a HEAD tells the size of a body that is not sent."""

    status: int
    body: bytes | bytearray = b""
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None


class Server:
    """Answers of one folder; `counts` of what was asked."""

    def __init__(self, objects: Objects, *, delay_seconds: float) -> None:
        self.objects, self.delay_seconds = objects, delay_seconds
        self.counts: dict[str, int] = {}
        self._parts: dict[str, dict[int, bytes]] = {}
        self._completed: set[str] = set()  # uploads: a client whose answer was lost asks once more

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: request after request until the client closes it."""
        try:
            while True:
                request = await self._read(reader)
                writer.write(self._packed(await self._answer(request)))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the server ends
        finally:
            writer.close()

    @staticmethod
    async def _read(reader: asyncio.StreamReader) -> Request:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        verb, target, _ = head[0].split(" ")
        pairs = (line.split(":", 1) for line in head[1:] if line)
        headers = {name.strip().lower(): value.strip() for name, value in pairs}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        split = urlsplit(target)
        query = parse_qs(split.query, keep_blank_values=True)
        return Request(verb, unquote(split.path)[1:], query, headers, body)

    @staticmethod
    def _packed(answer: Answer) -> bytes:
        length = len(answer.body) if answer.length is None else answer.length
        lines = [f"HTTP/1.1 {answer.status} {_REASONS.get(answer.status, 'Answer')}", f"Content-Length: {length}"]
        lines += [f"{name}: {value}" for name, value in answer.headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + bytes(answer.body)

    async def _answer(self, request: Request) -> Answer:
        if request.key == "_counts":
            text = counts_text(self.counts)
            if "reset" in request.query:
                self.counts = {}
            return Answer(200, text)
        await asyncio.sleep(self.delay_seconds)
        bucket, _, key = request.key.partition("/")
        if bucket != BUCKET:
            return Answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
        kind, answer = self._of_bucket(request) if not key else self._of_key(request, key)
        self._count(kind, 1)
        self._count("bytes_sent", len(answer.body))
        if kind == "GET":
            self._count(f"bytes_sent/{key.partition('/')[0]}", len(answer.body))
        return answer

    def _count(self, name: str, number: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + number

    def _of_bucket(self, request: Request) -> tuple[str, Answer]:
        if request.verb == "POST":  # a list of keys to delete
            keys = [unquote(key.decode()) for key in _KEY.findall(request.body)]
            for key in keys:
                self.objects.delete(key)
            told = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
            return "DELETE", Answer(200, f"<DeleteResult>{told}</DeleteResult>".encode())
        prefix, delimiter = request.asks("prefix") or "", request.asks("delimiter") or ""
        after = request.asks("continuation-token") or request.asks("start-after") or ""
        most = min(int(request.asks("max-keys") or PAGE_KEYS), PAGE_KEYS)
        keys, common, goes_on = self.objects.page(prefix, delimiter, after, most)
        parts = [
            f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(keys) + len(common)}</KeyCount>"
        ]
        parts.append(f"<MaxKeys>{most}</MaxKeys><IsTruncated>{str(goes_on is not None).lower()}</IsTruncated>")
        if goes_on is not None:
            parts.append(f"<NextContinuationToken>{escape(goes_on)}</NextContinuationToken>")
        parts += [self._content(key) for key in keys]
        parts += [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in common]
        return "LIST", Answer(200, f"<ListBucketResult>{''.join(parts)}</ListBucketResult>".encode())

    def _content(self, key: str) -> str:
        size, changed = self.objects.about[key]
        at = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(changed))
        return (
            f"<Contents><Key>{escape(key)}</Key><LastModified>{at}</LastModified><ETag>{self.objects.etag(key)}</ETag>"
            f"<Size>{size}</Size></Contents>"
        )

    def _of_key(self, request: Request, key: str) -> tuple[str, Answer]:
        if request.verb in ("GET", "HEAD"):
            return request.verb, self._get(request, key)
        if request.verb == "DELETE":
            self.objects.delete(key)
            return "DELETE", Answer(204)
        if request.verb == "POST":
            return "PUT", self._multipart(request, key)
        return "PUT", self._put(request, key)

    def _get(self, request: Request, key: str) -> Answer:
        if key not in self.objects.about:
            return Answer(404, b"" if request.verb == "HEAD" else b"<Error><Code>NoSuchKey</Code></Error>")
        size, changed = self.objects.about[key]
        headers = {"ETag": self.objects.etag(key), "Last-Modified": email.utils.formatdate(changed, usegmt=True)}
        if request.verb == "HEAD":
            return Answer(200, b"", headers, length=size)
        asked = request.headers.get("range")
        if asked is None:
            return Answer(200, self.objects.read(key, 0, size), headers)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, size - int(last))
        end = min(int(last) + 1, size) if last and first else size
        if start >= size:
            return Answer(416, b"<Error><Code>InvalidRange</Code></Error>")
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        return Answer(206, self.objects.read(key, start, end), headers)

    def _put(self, request: Request, key: str) -> Answer:
        upload = request.asks("uploadId")
        if upload is not None:
            self._parts[upload][int(request.asks("partNumber") or 0)] = request.body
            return Answer(200, b"", {"ETag": f'"{len(request.body):x}"'})
        data, source = request.body, request.headers.get("x-amz-copy-source")
        if source is not None:
            of = unquote(source).lstrip("/").partition("/")[2]
            if of not in self.objects.about:
                return Answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            data = bytes(self.objects.read(of, 0, self.objects.about[of][0]))
        if not self.objects.put(key, data, exclusive=request.headers.get("if-none-match") == "*"):
            return Answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        etag = self.objects.etag(key)
        told = b"" if source is None else f"<CopyObjectResult><ETag>{etag}</ETag></CopyObjectResult>".encode()
        return Answer(200, told, {"ETag": etag})

    def _multipart(self, request: Request, key: str) -> Answer:
        upload = request.asks("uploadId")
        if upload is None:
            upload = f"upload-{len(self._parts)}-{time.monotonic_ns()}"
            self._parts[upload] = {}
            told = f"<UploadId>{upload}</UploadId>"
            return Answer(200, f"<InitiateMultipartUploadResult>{told}</InitiateMultipartUploadResult>".encode())
        if upload not in self._completed:
            parts = self._parts.pop(upload)
            self.objects.put(key, *(parts[number] for number in sorted(parts)))
            self._completed.add(upload)
        told = f"<ETag>{self.objects.etag(key)}</ETag>"
        return Answer(200, f"<CompleteMultipartUploadResult>{told}</CompleteMultipartUploadResult>".encode())


async def serve(folder: Path, *, delay_seconds: float, seconds: float) -> None:
    """Serve until the parent process has ended, or the time is up."""
    objects, parent = Objects.of_folder(folder), os.getppid()
    server = Server(objects, delay_seconds=delay_seconds)
    listening = await asyncio.start_server(server.connected, "127.0.0.1", 0, limit=1 << 20, backlog=4096)
    print(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", flush=True)
    ends, stopping = time.monotonic() + seconds, asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    try:
        while os.getppid() == parent and time.monotonic() < ends and not stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), WATCH_SECONDS)
    finally:
        objects.close()


@dataclass(frozen=True)
class Served:
    """A server that runs: its URL, and what a child needs in its environment to find it."""

    url: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "made-up",
            "AWS_SECRET_ACCESS_KEY": "made-up",
            "AWS_REGION": "us-east-1",
        }

    def counts(self, *, reset: bool = False) -> dict[str, int]:
        return counts_at(self.url, reset=reset)


def counts_at(url: str, *, reset: bool = False) -> dict[str, int]:
    """What the server at `url` has counted since it began, or since the last reset."""
    with urllib.request.urlopen(f"{url}/_counts{'?reset' if reset else ''}", timeout=60) as answer:
        found: dict[str, int] = json.loads(answer.read())
    return found


@contextlib.contextmanager
def serving(folder: Path, *, delay_seconds: float, seconds: float = 7200.0) -> Iterator[Served]:
    """A server over `folder` in a process of its own, ended on the way out."""
    words = [str(folder), "--delay-ms", str(1000 * delay_seconds), "--minutes", str(seconds / 60)]
    command = [sys.executable, "-m", "benchmarks.scale_server", *words]
    process: subprocess.Popen[str] = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError(f"the server over {folder} ended with code {process.wait()} before it listened")
        yield Served(url)
    finally:
        process.terminate()
        process.wait(30)


def main() -> None:
    """Serve a folder as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="its files are the objects")
    parser.add_argument("--delay-ms", type=float, default=30.0, help="how long each request waits (30)")
    parser.add_argument("--minutes", type=float, default=120.0, help="it ends after so many (120)")
    options = parser.parse_args()
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is no folder")
    seconds = 60 * options.minutes
    asyncio.run(serve(options.folder, delay_seconds=options.delay_ms / 1000, seconds=seconds))


if __name__ == "__main__":
    main()
