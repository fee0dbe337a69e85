"""Log records go to standard error, marked with the rank; ranks above 0 are quiet."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from potstill.common.log import setup_logging


@pytest.fixture(autouse=True)
def _restore_logger() -> Iterator[None]:
    root = logging.getLogger("potstill")
    before = (root.handlers[:], root.propagate, root.level)
    yield
    root.handlers[:], root.propagate = before[0], before[1]
    root.setLevel(before[2])


def test_without_a_rank(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    setup_logging()
    logging.getLogger("potstill.test").info("hello")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(" I hello\n")
    assert "rank" not in captured.err


def test_rank_from_the_launcher(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    setup_logging()
    logging.getLogger("potstill.test").info("hello")
    logging.getLogger("potstill.test").warning("careful")
    assert capsys.readouterr().err.endswith(" W [rank 3] careful\n")


def test_set_up_twice_writes_once(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(rank=0)
    setup_logging(rank=0)
    logging.getLogger("potstill.test").info("hello")
    assert capsys.readouterr().err.count("hello") == 1


def test_records_go_to_the_stderr_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    setup_logging(rank=0)
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    logging.getLogger("potstill.test").info("hello")
    assert stream.getvalue().endswith("hello\n")
