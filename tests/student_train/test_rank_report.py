"""What ranks tell the command that started them becomes one message, and a warning of all ranks one line."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from potstill.common.errors import UserError
from potstill.student_train.run.rank_report import (
    OnceForAllRanks,
    main_error,
    name_ranks,
    read_errors,
    read_summary,
    write_error,
    write_summary,
)
from potstill.student_train.run.summary import TrainSummary


@pytest.mark.parametrize(
    ("ranks", "num_ranks", "words"),
    [([3], 16, "rank 3"), ([5, 0, 2], 16, "ranks 0, 2 and 5"), (range(16), 16, "all 16 ranks"), ([0], 1, "rank 0")],
)
def test_ranks_are_named(ranks: list[int], num_ranks: int, words: str) -> None:
    assert name_ranks(ranks, num_ranks) == words


def test_an_error_of_all_ranks_is_one(tmp_path: Path) -> None:
    for rank in range(16):
        write_error(tmp_path, rank=rank, error=UserError("lower optimizer.lr"), foreseen=True)
    assert main_error(read_errors(tmp_path), 16) == "all 16 ranks: lower optimizer.lr"


def test_what_a_person_can_act_on_comes_before_its_consequences(tmp_path: Path) -> None:
    write_error(tmp_path, rank=0, error=RuntimeError("Connection closed by peer"), foreseen=False)
    write_error(tmp_path, rank=1, error=OSError(28, "No space left on device", "x/metrics.jsonl"), foreseen=True)
    write_error(tmp_path, rank=2, error=RuntimeError("Connection closed by peer"), foreseen=False)
    assert main_error(read_errors(tmp_path), 3) == "rank 1: [Errno 28] No space left on device: 'x/metrics.jsonl'"


def test_a_defect_keeps_its_type(tmp_path: Path) -> None:
    assert main_error(read_errors(tmp_path), 2) is None
    write_error(tmp_path, rank=1, error=KeyError("x"), foreseen=False)
    assert main_error(read_errors(tmp_path), 2) == "rank 1: KeyError: 'x'"


def test_the_summary_comes_back_as_it_was(tmp_path: Path) -> None:
    assert read_summary(tmp_path) is None
    heldout = {"heldout_loss": 2.25, "rows": 3.0, "positions": 31900.0}
    summary = TrainSummary("done", Path("run"), 4, 4, 512, 100, 1.5, {"loss": 2.0, "ce": None}, heldout)
    write_summary(tmp_path, summary)
    assert read_summary(tmp_path) == summary
    assert "last loss 2.0000 (ce not finite)" in summary.format()
    assert "heldout_loss 2.2500, rows 3, positions 31,900" in summary.format()


def test_a_warning_of_all_ranks_is_shown_once_and_repeated_when_it_repeats(tmp_path: Path) -> None:
    def record(level: int, text: str) -> logging.LogRecord:
        return logging.LogRecord("potstill.x", level, __file__, 1, "%s", (text,), None)

    ranks = [OnceForAllRanks(tmp_path) for _ in range(3)]
    assert [rank.filter(record(logging.WARNING, "skipped")) for rank in ranks] == [True, False, False]
    assert [rank.filter(record(logging.WARNING, "skipped")) for rank in reversed(ranks)] == [True, False, False]
    assert ranks[2].filter(record(logging.WARNING, "of rank 2 alone"))
    assert all(rank.filter(record(logging.INFO, "a line of the log")) for rank in ranks)
