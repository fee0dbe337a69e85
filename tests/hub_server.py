"""A Hugging Face hub on the loopback: repositories with commits, branches and large files, as its client asks for them.

What it answers follows huggingface_hub's own requests (create, preupload, LFS batch, commit, tree, resolve). It keeps
its word on what the real one refuses: a wrong token, a commit on another parent, a licence that is none, bytes that are
not those of their digest. Xet, the hub's newer transfer of large files, is not spoken: set HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_of_the_test"
LARGE = (".safetensors", ".arrow")
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.*))?)?)?$")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


@dataclass
class Repository:
    """Files by path in each commit; `branches` names the last commit of each."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], *, branch: str = "main") -> str:
        listed = [(path, hashlib.sha1(data).hexdigest()) for path, data in sorted(files.items())]
        oid = hashlib.sha1(json.dumps([len(self.commits), listed]).encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None


@dataclass
class Hub:
    """What a hub holds and was asked. A request whose line holds `stalled` gets no answer before the hub ends."""

    address: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    stalled: str | None = None
    fault: Callable[[str], int | None] = field(default=lambda line: None)
    ended: threading.Event = field(default_factory=threading.Event)

    def speak_to(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Have processes that are started from now on take this for the hub, with a good token."""
        settings = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)

    def add(self, kind: str, name: str, files: dict[str, bytes], *, private: bool = False) -> Repository:
        repository = Repository(private)
        repository.commit({".gitattributes": b"*.safetensors filter=lfs\n", **files})
        self.repositories[kind, name] = repository
        return repository


def describe(path: str, data: bytes) -> dict[str, Any]:
    """A file as a listing shows it."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{hashlib.sha256(data).hexdigest()}\n".encode()
    stored = pointer if path.endswith(LARGE) else data
    oid = hashlib.sha1(f"blob {len(stored)}\0".encode() + stored).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid}
    if path.endswith(LARGE):
        sha = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sha, "size": len(data), "pointerSize": len(pointer)}
    return entry


class Handler(BaseHTTPRequestHandler):
    """`serve_hub` makes the class of one hub."""

    hub: Hub

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def do_GET(self) -> None:
        path, data = unquote(urlsplit(self.path).path), self.body()
        line = f"{self.command} {path}"
        self.hub.seen.append(line)
        if self.hub.stalled is not None and self.hub.stalled in line:
            self.hub.ended.wait()
            return None
        if (status := self.hub.fault(line)) is not None:
            return self.answer(status)
        bearer = self.headers.get("Authorization", "")
        writes = self.command in ("POST", "PUT") and "paths-info" not in path and not path.startswith("/lfs/")
        if (bearer and bearer != f"Bearer {TOKEN}") or (writes and not bearer):
            return self.answer(401, {"error": "Invalid credentials"})
        if path == "/":
            return self.answer(200)
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": "me", "type": "user", "orgs": []}) if bearer else self.answer(401)
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        if path == "/api/validate-yaml":
            wrong = b"fill-in-before-publishing" in data
            errors = [{"message": '"license" must be one of a list'}] if wrong else []
            return self.answer(400 if wrong else 200, {"errors": errors, "warnings": []})
        if path.startswith("/lfs/"):
            return self.large(path.removeprefix("/lfs/"), data)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(data))
        if match := _API.match(path):
            return self.api(*match.groups(), data)
        if match := _FILE.match(path):
            return self.file("datasets" if match[1] else "models", match[2], match[3], match[4])
        return self.answer(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_POST = do_PUT = do_GET

    def create(self, asked: dict[str, Any]) -> None:
        kind, name = f"{asked.get('type') or 'model'}s", f"{asked['organization']}/{asked['name']}"
        if (kind, name) in self.hub.repositories:
            return self.answer(409, {"error": "You already created this repo"})
        self.hub.add(kind, name, {}, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return self.answer(200, {"url": f"{self.hub.address}/{name}", "name": name})

    def batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            href = f"{self.hub.address}/lfs/{one['oid']}"
            there = one["oid"] in self.hub.large
            objects.append(one if there else {**one, "actions": {"upload": {"href": href, "header": {}}}})
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def large(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            return self.answer(400, {"error": "content does not fit its sha256"})
        self.hub.large[oid] = data
        return self.answer(200)

    def api(self, kind: str, name: str, verb: str | None, revision: str | None, rest: str | None, data: bytes) -> None:
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if verb == "branch":
            if revision in repository.branches:
                return self.answer(409, {"error": "Reference already exists"})
            repository.branches[str(revision)] = repository.branches["main"]
            return self.answer(201)
        oid = repository.find(revision or "main")
        if oid is None:
            return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        files = repository.commits[oid]
        if verb in (None, "revision"):
            siblings = [{"rfilename": path} for path in sorted(files)]
            body = {"id": name, "sha": oid, "private": repository.private, "tags": [], "siblings": siblings}
            return self.answer(200, body)
        if verb == "tree":
            return self.tree(files, rest or "")
        if verb == "paths-info":
            asked = parse_qs(data.decode()).get("paths", []) if not data.startswith(b"{") else json.loads(data)["paths"]
            return self.answer(200, [describe(path, files[path]) for path in asked if path in files])
        if verb == "preupload":
            found = []
            for one in json.loads(data)["files"]:
                path = one["path"]
                oid_there = describe(path, files[path])["oid"] if path in files else None
                mode = "lfs" if path.endswith(LARGE) else "regular"
                found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid_there})
            return self.answer(200, {"files": found})
        return self.commit(repository, oid, str(revision), [json.loads(line) for line in data.splitlines()])

    def tree(self, files: dict[str, bytes], folder: str) -> None:
        inside = {path: data for path, data in files.items() if not folder or path.startswith(f"{folder}/")}
        if folder and not inside:
            return self.answer(404, X_Error_Code="EntryNotFound")
        entries = []
        if "recursive=true" in self.path.lower():
            entries = [describe(path, data) for path, data in sorted(inside.items())]
        else:
            start = len(folder) + 1 if folder else 0
            here = {path: data for path, data in inside.items() if "/" not in path[start:]}
            below = {path[: path.index("/", start)] for path in inside if "/" in path[start:]}
            entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(below)]
            entries += [describe(path, data) for path, data in sorted(here.items())]
        return self.answer(200, entries)

    def commit(self, repository: Repository, head: str, branch: str, lines: list[dict[str, Any]]) -> None:
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != head:
            return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(repository.commits[head])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        oid = repository.commit(files, branch=branch)
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.address}/x/y/commit/{oid}"})

    def file(self, kind: str, name: str, revision: str, path: str) -> None:
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        oid = repository.find(revision)
        if oid is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        content = repository.commits[oid].get(path)
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": oid, "Accept_Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.answer(200, content, **headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if first >= len(content):
            return self.answer(416, Content_Range=f"bytes */{len(content)}")
        span = f"bytes {first}-{last}/{len(content)}"
        return self.answer(206, content[first : last + 1], Content_Range=span, **headers)

    def log_message(self, format: str, *arguments: object) -> None: ...


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Yield a hub that serves, empty at first."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("ServedHub", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        server.server_close()
        thread.join(5)
