"""Progress writes plain lines to a log and counts what it was told."""

from __future__ import annotations

import io
import re

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
    first, second, last = stream.getvalue().splitlines()
    assert re.fullmatch(r"dump: 4/10 rows, [\d,.]+ rows/s, ETA \S+ loss=3\.21 file=a\.txt", first)
    assert re.fullmatch(r"dump: 10/10 rows, [\d,.]+ rows/s, in \S+ loss=3\.21 file=a\.txt", second)
    assert last.startswith("dump: 10/10 rows")
    assert "\r" not in stream.getvalue()


def test_lines_are_seldom_and_the_last_one_always_comes() -> None:
    stream = io.StringIO()
    with Progress(None, unit="tokens", description="score", stream=stream) as progress:
        for _ in range(100):
            progress.update()
    assert re.fullmatch(r"score: 100 tokens, [\d,.]+ tokens/s, in \S+\n", stream.getvalue())


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


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with Progress(2, unit="rows", description="dump", stream=stream) as progress:
        progress.note(loss=1.0)
        progress.update(2)
    assert "2/2" in stream.getvalue()
    assert "\r" in stream.getvalue()
