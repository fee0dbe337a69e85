"""Progress writes plain lines to a log and counts what it was told."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pytest

from potstill.common.progress import Progress, format_seconds


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0s"), (7.25, "7.2s"), (60, "1m00s"), (185.9, "3m05s"), (3720, "1h02m")]
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_plain_lines_carry_count_rate_eta_and_figures() -> None:
    stream = io.StringIO()
    with Progress(10, unit="rows", description="dump", stream=stream, line_every_seconds=0.0) as progress:
        progress.note(loss=3.21049, file="a.txt")
        progress.update(4)
        progress.update(6)
    first, last = stream.getvalue().splitlines()
    assert re.fullmatch(r"dump: 4/10 rows, [\d,.]+ rows/s, ETA \S+ loss=3\.21 file=a\.txt", first)
    assert re.fullmatch(r"dump: 10/10 rows, [\d,.]+ rows/s, in \S+ loss=3\.21 file=a\.txt", last)
    assert "\r" not in stream.getvalue()


def test_lines_are_seldom_and_the_last_one_always_comes() -> None:
    stream = io.StringIO()
    with Progress(None, unit="tokens", description="score", stream=stream) as progress:
        for _ in range(100):
            progress.update()
    assert re.fullmatch(r"score: 100 tokens, [\d,.]+ tokens/s, in \S+\n", stream.getvalue())


def test_work_done_before_counts_but_has_no_part_in_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("potstill.common.progress.time.monotonic", lambda: clock[0])
    progress = Progress(60, done=20, unit="steps", description="train", stream=io.StringIO())
    clock[0] += 8.0
    progress.update(16)
    assert progress.line() == "train: 36/60 steps, 2.0 steps/s, ETA 12.0s"
    assert Progress(60, done=60, unit="steps", description="train").line().startswith("train: 60/60 steps, 0.0 steps/s")


def test_the_last_line_is_written_once() -> None:
    stream = io.StringIO()
    with Progress(2, unit="steps", description="train", stream=stream, line_every_seconds=0.0) as progress:
        progress.update()
        progress.update()
    assert [line.split(" ")[1] for line in stream.getvalue().splitlines()] == ["1/2", "2/2"]


def test_an_error_ends_without_a_line_that_sounds_like_success() -> None:
    stream = io.StringIO()

    def fail() -> None:
        with Progress(3, stream=stream) as progress:
            progress.update()
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert stream.getvalue() == ""


def test_disabled_is_silent() -> None:
    stream = io.StringIO()
    with Progress(3, stream=stream, enabled=False, line_every_seconds=0.0) as progress:
        progress.update(3)
    assert stream.getvalue() == ""
    assert progress.done == 3


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_log_records_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.stderr", stream)
    with Progress(30, done=20, unit="rows", description="dump") as progress:
        progress.note(loss=1.0, file="[b]")
        progress.update(10)
        print("a record", file=sys.stderr)
    shown = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", stream.getvalue())
    assert "30/30 rows" in shown and "loss=1 file=[b]" in shown
    assert "\r" in stream.getvalue(), "drawn again in place"
    record = next(line for line in shown.splitlines() if "a record" in line)
    assert record.rpartition("\r")[2].rstrip() == "a record", "a line of its own"


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setenv("TERM", "dumb")
    with Progress(2, unit="rows", description="dump", stream=stream) as progress:
        progress.update(2)
    assert re.fullmatch(r"dump: 2/2 rows, \S+ rows/s, in \S+\n", stream.getvalue())


def test_a_log_file_needs_no_rich() -> None:
    code = (
        "import io, sys\n"
        "from potstill.common.progress import Progress\n"
        "with Progress(1, stream=io.StringIO()) as progress:\n"
        "    progress.update()\n"
        "print('rich' in sys.modules or 'tqdm' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout == "False\n", done.stderr
