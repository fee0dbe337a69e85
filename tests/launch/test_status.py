"""`potstill status --watch`: drawn in place on a terminal, lines elsewhere, ends with the store; tables in pipes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from potstill.common.text_tables import print_table, table
from potstill.launch import status_command
from potstill.launch.cli import main
from potstill.storage import seal_store, store_status
from potstill.storage.store import status as store_status_module
from tests.launch.conftest import write_targets


@pytest.fixture
def half(data: Path, tmp_path: Path) -> Path:
    """A targets store of which two units are there."""
    write_targets(data / "train", tmp_path / "targets", units=2)
    return tmp_path / "targets"


def finish(data: Path, store: Path) -> None:
    write_targets(data / "train", store)
    seal_store(store)


def test_watch_prints_a_line_when_something_changed_and_ends_when_sealed(
    half: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    total = store_status(half).num_units
    worker = threading.Timer(0.4, finish, args=(data, half))
    worker.start()
    assert main(["status", str(half), "--watch", "0.02"]) == 0
    worker.join()
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"\d\d:\d\d:\d\d {half}: 2/{total} units, 8 rows, .*", lines[0])
    assert f"{half}: sealed, {total}/{total} units" in lines[-1]
    states = [line.partition(" ")[2] for line in lines]
    assert len(states) == len(set(states)) < 20, "nothing is said twice"


def test_watch_as_json_and_wrong_seconds(half: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(data, half)
    capsys.readouterr()
    assert main(["status", str(half), "--watch", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["sealed"] is True
    for words in (["--watch", str(half)], [str(half), "--watch", "0"], [str(half), "--watch", "nan"]):
        with pytest.raises(SystemExit) as caught:
            main(["status", *words])
        assert caught.value.code == 2
    assert "give a number above 0" in capsys.readouterr().err


def test_a_complete_store_that_nobody_seals_ends_with_3(
    half: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_targets(data / "train", half)
    monkeypatch.setattr(status_command, "SEALING_SECONDS", 0.1)
    assert main(["status", str(half), "--watch", "0.02"]) == 3
    assert f"run: potstill seal {half}" in capsys.readouterr().err


def test_what_is_estimated_is_said_to_be_about(
    half: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    for few, about in ((100, set()), (1, {"rate rows per second", "bytes"})):
        monkeypatch.setattr(store_status_module, "_FEW", few)
        assert main(["status", str(half)]) == 3
        lines = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
        figures = {line[0]: line[1] for line in lines if len(line) == 2}
        assert {name for name, text in figures.items() if text.startswith("about ")} >= about
        assert bool(about) == any(text.startswith("about ") for text in figures.values()) and "estimated" not in figures
        assert main(["status", str(half), "--json"]) == 3
        assert json.loads(capsys.readouterr().out)["estimated"] is bool(about)


@contextmanager
def on_a_terminal(*words: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The command as a process whose standard output is a terminal; yields it and the other end."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", "potstill.launch", *words],
        stdout=theirs,
        stderr=subprocess.PIPE,
        env={**environment, "COLUMNS": "100", "LINES": "40"},
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
        os.close(ours)


def read_until(terminal: int, wanted: str, *, seconds: float = 60.0) -> str:
    """What comes from the terminal until `wanted` is in it or its other end is closed."""
    seen, end = "", time.monotonic() + seconds
    while wanted not in seen and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                part = os.read(terminal, 65536)
            except OSError:  # Linux: the process has ended
                break
            seen += part.decode(errors="replace")
    return seen


def test_watch_on_a_terminal_is_drawn_in_place(half: Path, data: Path) -> None:
    with on_a_terminal("status", str(half), "--watch", "0.1") as (process, terminal):
        seen = read_until(terminal, "Ctrl-C to leave")
        assert "rows committed" in seen and "━" in seen, seen
        finish(data, half)
        seen += read_until(terminal, "never")
        assert process.wait(timeout=30) == 0
    assert "sealed" in seen.replace("not sealed", "") and "\x1b[1A" in seen, "the cursor goes up and draws again"


def test_ctrl_c_ends_watching(half: Path) -> None:
    with on_a_terminal("status", str(half), "--watch", "0.1") as (process, terminal):
        read_until(terminal, "Ctrl-C to leave")
        process.send_signal(signal.SIGINT)
        seen = read_until(terminal, "never", seconds=20)
        assert process.wait(timeout=30) == 130
        assert b"Traceback" not in process.stderr.read()  # type: ignore[union-attr]
    assert "\x1b[?25h" in seen, "the cursor is shown again"


def test_tables_in_a_pipe_are_plain_and_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    long = "word " * 60
    print_table(["what", "figure"], [("[b]rows[/b] :smile:", "1,000"), ("x", long)], title="a title")
    title, header, dashes, first, second = capsys.readouterr().out.splitlines()
    assert title == "a title"
    assert header.split() == ["what", "figure"] and set(dashes) == {"-", " "}
    assert first.split() == ["[b]rows[/b]", ":smile:", "1,000"]
    assert second.endswith(long.rstrip())
    assert len(first) == len(header) == 19 + 2 + len(long)
    assert table(["a", "b"], [("x", 1), ("long", 22)], align="<<").splitlines() == [
        "a     b",
        "----- --",
        "x     1",
        "long  22",
    ]
