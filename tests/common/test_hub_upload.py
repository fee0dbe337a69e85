"""A folder pushed to a hub on the loopback by the hub's own client: what arrives, and what is refused before."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from potstill.common.errors import UserError
from potstill.common.hub_upload import run_upload
from tests.hub_server import TOKEN, Hub, serve_hub

REPO = "acme/student"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as served:
        served.speak_to(monkeypatch, tmp_path / "hub")
        yield served


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (made / "README.md").write_text("---\nlicense: mit\n---\n# A student\n")
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    return made


def asked(**changes: Any) -> dict[str, Any]:
    return {"repo": REPO, "revision": None, "private": False, "force": False, **changes}


def look(**changes: Any) -> dict[str, Any]:
    return run_upload("look", asked(**changes), seconds=60)


def push(folder: Path, seen: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return run_upload("upload", {**asked(**changes), "seen": seen, "folder": str(folder), "message": "m"}, seconds=60)


def test_a_folder_becomes_one_commit(hub: Hub, folder: Path) -> None:
    seen = look(private=True)
    assert seen == {"exists": False, "branch": True, "head": None} and not hub.repositories
    pushed = push(folder, seen, private=True)
    repository = hub.repositories["models", REPO]
    files = dict(repository.commits[pushed["commit"]])
    assert repository.private and repository.branches == {"main": pushed["commit"]} and pushed["files"] == 3
    del files[".gitattributes"]
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert pushed["url"] == f"{hub.address}/{REPO}/tree/{pushed['commit']}"
    assert any(line.startswith("PUT /lfs/") for line in hub.seen)  # the weights went the way of large files
    with pytest.raises(UserError, match=r"main of the repository holds 3 files already.*nothing is overwritten"):
        look()


@pytest.mark.slow
def test_files_that_stand_there_are_replaced_only_by_force_or_left_on_their_branch(hub: Hub, folder: Path) -> None:
    repository = hub.add("models", REPO, {"config.json": b"{}", "old-00001-of-00002.safetensors": b"old"})
    first = repository.branches["main"]
    with pytest.raises(UserError, match=rf"holds 2 files already \(config.json, .*commit {first}.*--force"):
        look()
    with pytest.raises(UserError, match="public already"):
        look(private=True, force=True)
    seen = look(revision="second")
    assert seen == {"exists": True, "branch": False, "head": first}
    pushed = push(folder, seen, revision="second")
    assert repository.branches == {"main": first, "second": pushed["commit"]}
    with pytest.raises(UserError, match="second of the repository holds 3 files already"):
        look(revision="second")
    seen = look(force=True)
    # Somebody commits between the look and the upload: nothing of theirs is replaced.
    theirs = repository.commit({"config.json": b"theirs"})
    with pytest.raises(UserError, match="A commit has happened since"):
        push(folder, seen, force=True)
    assert repository.branches["main"] == theirs
    pushed = push(folder, look(force=True), force=True)
    assert set(repository.commits[pushed["commit"]]) - {".gitattributes"} == {path.name for path in folder.iterdir()}


def test_what_arrived_is_compared_with_the_folder(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that writes down something else than it was sent."""
    seen = look()
    true_commit = type(hub.add("models", "a/b", {})).commit

    def lying(self: Any, files: dict[str, bytes], *, branch: str = "main") -> str:
        return true_commit(self, {**files, **({"config.json": b"{}"} if "config.json" in files else {})}, branch=branch)

    monkeypatch.setattr("tests.hub_server.Repository.commit", lying)
    with pytest.raises(UserError, match=r"does not hold what the folder .* does: config.json \(1 files in all\)"):
        push(folder, seen)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"HF_TOKEN": ""}, "no token: set HF_TOKEN"),
        pytest.param({"HF_TOKEN": "hf_wrong"}, "the hub does not know the token", marks=pytest.mark.slow),
        pytest.param({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set; nothing was exported", marks=pytest.mark.slow),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_what_is_missing_is_said(
    variables: dict[str, str], message: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"push {REPO}: {message}") as caught:
        look()
    assert TOKEN not in str(caught.value) and "hf_wrong" not in str(caught.value)
    assert not hub.repositories


@pytest.mark.slow
def test_a_hub_that_never_answers_is_given_up(hub: Hub, folder: Path) -> None:
    hub.stalled = "/api/repos/create"
    began = time.monotonic()
    with pytest.raises(UserError, match="gave no answer to `upload` within 4 seconds"):
        run_upload("upload", {**asked(), "seen": look(), "folder": str(folder), "message": "m"}, seconds=4)
    assert time.monotonic() - began < 60 and any("repos/create" in line for line in hub.seen)
