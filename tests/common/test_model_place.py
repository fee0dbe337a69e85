"""A model that is not there is said to be so within seconds: folders at once, hub ids after one short question."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from potstill.common.errors import UserError
from potstill.common.model_place import TOKENIZER_FILES, find_model


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path), what="teacher") is False


@pytest.mark.parametrize("name", ["./teacher", "../teacher", "/no/such/teacher", "~/teacher", "a/b/c", "models/techer"])
def test_what_looks_like_a_folder_is_no_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "teacher").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="this folder does not exist") as caught:
        find_model(name, what="teacher")
    assert ("did you mean models/teacher?" in str(caught.value)) == (name == "models/techer")


def test_a_folder_without_the_files_says_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "step_100").mkdir()
    (tmp_path / "step_100" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds none of config\.json; these folders in it do: step_100"):
        find_model(str(tmp_path), what="teacher")
    with pytest.raises(UserError, match=r"is a file; name the folder"):
        find_model(str(tmp_path / "step_100" / "config.json"), what="teacher")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        find_model(str(tmp_path / "step_100"), what="tokenizer", files=TOKENIZER_FILES)


@pytest.fixture
def dead_hub() -> Iterator[tuple[str, list[int]]]:
    """An address on the loopback that hangs up on everybody, and a list that grows with each who called."""
    calls: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            while True:
                try:
                    connection, (_, port) = server.accept()
                except OSError:  # closed: the test is over
                    return
                calls.append(port)
                connection.close()

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", calls
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def ask(code: str, cache: Path, endpoint: str, *, offline: str = "0") -> str:
    """What a fresh process prints for `code`, with this address for the hub."""
    script = (
        "from potstill.common.model_place import find_model\nfrom potstill.common.errors import UserError\n"
        f"try:\n    print({code})\nexcept UserError as error:\n    print(error)\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "HF_HUB_OFFLINE": offline,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
    }
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path: Path, dead_hub: tuple[str, list[int]]) -> None:
    endpoint, calls = dead_hub
    text = ask('find_model("some-org/some-model", what="teacher")', tmp_path, endpoint)
    assert "'some-org/some-model' is no folder here and not in the hub's cache" in text and "\n" not in text
    assert f"{endpoint} cannot be reached" in text and "name a folder" in text
    assert len(calls) == 1  # the hub's client alone calls six times for each file, with pauses of 23 seconds


def test_a_hub_id_in_the_cache_is_taken_from_there(
    tmp_path: Path, tokenizer_like: Path, dead_hub: tuple[str, list[int]]
) -> None:
    snapshot = tmp_path / "hub" / "models--some-org--some-model" / "snapshots" / "0123456789abcdef"
    shutil.copytree(tokenizer_like, snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123456789abcdef")
    for offline in ("0", "1"):
        code = 'find_model("some-org/some-model", what="teacher")'
        assert ask(code, tmp_path, dead_hub[0], offline=offline) == "True"


def test_offline_is_said_to_be_the_reason(tmp_path: Path) -> None:
    assert "HF_HUB_OFFLINE is set" in ask(
        'find_model("some-model", what="tokenizer")', tmp_path, "http://127.0.0.1:9", offline="1"
    )


@pytest.fixture
def tokenizer_like(tmp_path: Path) -> Path:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder
