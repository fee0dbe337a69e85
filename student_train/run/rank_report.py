"""What the ranks of one machine tell the command that started them: how the run ended, or what went wrong.

Each rank writes one small file into a folder that the command made. Exit codes alone would not say which rank failed
first, and every rank's own message on the console would be the same line n times.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from potstill.common.errors import PreemptedError
from potstill.student_train.run.summary import TrainSummary

FOLDER_VARIABLE = "POTSTILL_RANK_REPORTS"  # where a rank writes its report; set by `potstill train`
LOG_VARIABLE = "POTSTILL_RANK_LOG"  # the file that takes everything that is not for a person
_SUMMARY = "summary.json"


@dataclass(frozen=True)
class RankError:
    """What a rank says of its end."""

    rank: int
    text: str
    foreseen: bool  # for the person at the terminal; otherwise a defect, or what the end of another rank brought about
    time: float
    preempted: bool = False  # a signal has ended it, at a place where nothing could be saved


def write_error(folder: Path, *, rank: int, error: BaseException, foreseen: bool) -> None:
    """Leave word of an error: its message, or its type and message if it was not foreseen."""
    text = str(error) or type(error).__name__
    text = text if foreseen else f"{type(error).__name__}: {text}"
    found = RankError(rank, text, foreseen, time.time(), preempted=isinstance(error, PreemptedError))
    _write(folder / f"error_{rank}.json", asdict(found))


def write_summary(folder: Path, summary: TrainSummary) -> None:
    """Leave word of how the run ended; by rank 0."""
    _write(folder / _SUMMARY, summary.to_json())


def _write(path: Path, value: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value), encoding="utf-8")
    os.replace(part, path)


def read_summary(folder: Path) -> TrainSummary | None:
    """How the run ended, or None if rank 0 did not come to its end."""
    path = folder / _SUMMARY
    return TrainSummary.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def read_errors(folder: Path) -> list[RankError]:
    """The errors of all ranks, in the order in which they came."""
    found = [RankError(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("error_*.json")]
    return sorted(found, key=lambda error: error.time)


def name_ranks(ranks: Sequence[int], num_ranks: int) -> str:
    """`rank 3`, `ranks 0, 2 and 5` or `all 16 ranks`."""
    names = [str(rank) for rank in sorted(ranks)]
    if len(names) == num_ranks > 1:
        return f"all {num_ranks} ranks"
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {', '.join(names[:-1])} and {names[-1]}"


def main_error(errors: Sequence[RankError], num_ranks: int) -> str | None:
    """The one error to show, with the ranks that said it: the first that a person can act on, else the first."""
    if not errors:
        return None
    first = next((error for error in errors if error.foreseen), errors[0])
    same = [error.rank for error in errors if error.text == first.text]
    return f"{name_ranks(same, num_ranks)}: {first.text}"


class OnceForAllRanks(logging.Filter):
    """Lets a warning through on the first rank that has it: the n-th time of a message on each rank is one event."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._seen: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this rank is the one to show the record."""
        if record.levelno < logging.WARNING:
            return True
        text = f"{record.levelno} {record.getMessage()}"
        self._seen[text] += 1
        name = hashlib.sha256(f"{self._seen[text]} {text}".encode()).hexdigest()[:32]
        try:
            (self._folder / f"said_{name}").touch(exist_ok=False)
        except FileExistsError:
            return False
        except FileNotFoundError:  # the command has gone
            return True
        return True
