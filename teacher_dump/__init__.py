"""The teacher stage: `prepare` text, `dump` a teacher's targets, `score` rows with a small model.

The heavy libraries are loaded inside the three functions, so that neither the command's help nor the refusal of a path
waits for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from potstill.teacher_dump.config import DumpConfig, PrepareConfig, ScoreConfig

if TYPE_CHECKING:
    from potstill.teacher_dump.preparing import PrepareSummary
    from potstill.teacher_dump.series import SeriesSummary
    from potstill.teacher_dump.worker import WorkerSummary

__all__ = ["DumpConfig", "PrepareConfig", "ScoreConfig", "dump", "prepare", "score"]


def prepare(config: PrepareConfig) -> PrepareSummary:
    """Text files -> tokens stores; see potstill.teacher_dump.preparing."""
    from potstill.teacher_dump import preparing

    return preparing.prepare(config)


def dump(
    config: DumpConfig, worker: int | None = None, num_workers: int | None = None
) -> WorkerSummary | SeriesSummary:
    """Teacher over a tokens store -> targets store; see potstill.teacher_dump.dumping."""
    from potstill.teacher_dump.early import early_dump

    config = early_dump(config)
    from potstill.teacher_dump import dumping

    return dumping.dump(config, worker, num_workers)


def score(config: ScoreConfig, worker: int | None = None, num_workers: int | None = None) -> WorkerSummary:
    """Small language model over a tokens store -> scores store; see potstill.teacher_dump.scoring."""
    from potstill.teacher_dump.early import early_score

    config = early_score(config)
    from potstill.teacher_dump import scoring

    return scoring.score(config, worker, num_workers)
