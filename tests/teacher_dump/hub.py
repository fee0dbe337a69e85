"""A hub on the loopback that serves one data set at one commit: what `datasets` asks of it, and nothing more."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub(BaseHTTPRequestHandler):
    """Answers for one data set; `serve` makes the class of one hub, with what it holds."""

    name: str
    files: dict[str, bytes]
    commits: list[str]
    seen: list[str]

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def entry(self, path: str) -> dict[str, object]:
        oid = hashlib.sha1(self.files[path]).hexdigest()
        return {"type": "file", "oid": oid, "size": len(self.files[path]), "path": path}

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.seen.append(f"{self.command} {path}")
        if self.command == "POST":
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
        commit = self.commits[-1]
        for known in self.commits:
            path = path.replace(f"/{known}", "/main")
            commit = known if f"/{known}" in self.path else commit
        if path.startswith(f"/datasets/{self.name}/resolve/main/"):
            self.file(path.split("/resolve/main/")[1], commit)
        elif path.startswith(f"/api/datasets/{self.name}/tree/main"):
            if path.split("/tree/main")[1].strip("/"):  # all files lie at the top
                return self.answer(404, X_Error_Code="EntryNotFound")
            found = [self.entry(file) for file in sorted(self.files)]
            self.answer(200, json.dumps(found).encode(), Content_Type="application/json")
        elif path.startswith(f"/api/datasets/{self.name}/paths-info/main"):
            self.answer(200, b"[]", Content_Type="application/json")
        elif path in (f"/api/datasets/{self.name}", f"/api/datasets/{self.name}/revision/main"):
            siblings = [{"rfilename": file} for file in self.files]
            body = {"id": self.name, "sha": commit, "private": False, "tags": [], "siblings": siblings}
            self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
        else:
            self.answer(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_POST = do_GET

    def file(self, path: str, commit: str) -> None:
        if path not in self.files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content, first, last = self.files[path], 0, len(self.files[path]) - 1
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes="):
            start, _, end = wanted[6:].partition("-")
            first, last = int(start), min(int(end or last), last)
        self.answer(
            206 if wanted else 200,
            content[first : last + 1],
            ETag=f'"{hashlib.sha1(content).hexdigest()}"',
            X_Repo_Commit=commit,
            Accept_Ranges="bytes",
            Content_Range=f"bytes {first}-{last}/{len(content)}",
        )

    def log_message(self, format: str, *arguments: object) -> None: ...


@contextmanager
def serve(name: str, files: dict[str, bytes], *, commits: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield (address, requests seen). `commits[-1]` is what `main` names at the time of a request."""
    seen: list[str] = []
    hub = type("ServedHub", (Hub,), {"name": name, "files": files, "commits": commits, "seen": seen})
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
