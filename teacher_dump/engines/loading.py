"""From the name of an engine to the ranks that run it and to the loaded teacher."""

from __future__ import annotations

from importlib import import_module

from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.base import OneProcess, Ranks, TeacherEngine, TopKWanted
from potstill.teacher_dump.engines.table import ENGINES


def join_ranks(teacher: TeacherConfig) -> Ranks:
    """The ranks that hold this teacher together; nothing is loaded yet. Raises UserError without a launcher."""
    entry = ENGINES[teacher.engine]
    if not entry.is_group:
        return OneProcess()
    ranks: Ranks = import_module(entry.module).join_group(teacher)
    return ranks


def load_engine(
    teacher: TeacherConfig, wanted: TopKWanted | None = None, *, row_length: int | None = None
) -> TeacherEngine:
    """Load the teacher's weights and return its engine, ready to run. Raises UserError.

    `wanted` is for engines that give a finished top-k; None where draws are made, which such an engine cannot.
    `row_length` is for engines that reserve memory by it: tokens of the longest document; None: the model's context.
    """
    entry = ENGINES[teacher.engine]
    module = entry.mixture if teacher.ensemble and entry.mixture is not None else entry.module
    more = {"row_length": row_length} if entry.takes_row_length else {}
    engine: TeacherEngine = import_module(module).load(teacher, wanted, **more)
    return engine
