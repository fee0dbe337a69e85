"""The teacher stage: `prepare` text or a data set, `dump` a teacher's targets, `score` rows with a small model.

`rollout` asks a model for answers of its own, grades them, and keeps them for a stage.

`import_tokens` makes of token ids that another program wrote what `prepare` makes of text.

The heavy libraries are loaded inside the functions, so that neither the command's help nor the refusal of a path
waits for them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from potstill.teacher_dump.config import (
    DatasetInput,
    DumpConfig,
    PrepareConfig,
    ScoreConfig,
    SelectionConfig,
    TeacherConfig,
    TrainTokenizer,
)
from potstill.teacher_dump.importing.targets.config import ImportTargetsConfig
from potstill.teacher_dump.importing.tokens.config import ImportTokensConfig
from potstill.teacher_dump.rollouts.config import RolloutConfig
from potstill.teacher_dump.steps import DumpStep, ScoreStep, SealStep

if TYPE_CHECKING:
    from potstill.teacher_dump.dumping import Runner
    from potstill.teacher_dump.importing.targets.summary import ImportTargetsSummary
    from potstill.teacher_dump.job import StoppedError, WorkerSummary
    from potstill.teacher_dump.left_out import RowsOf
    from potstill.teacher_dump.rollouts.run import RolloutSummary
    from potstill.teacher_dump.series import SeriesSummary
    from potstill.teacher_dump.train_and_heldout import PrepareSummary

__all__ = [
    "DatasetInput",
    "DumpConfig",
    "DumpStep",
    "ImportTargetsConfig",
    "ImportTokensConfig",
    "PrepareConfig",
    "RolloutConfig",
    "ScoreConfig",
    "ScoreStep",
    "SealStep",
    "SelectionConfig",
    "StoppedError",
    "TeacherConfig",
    "TrainTokenizer",
    "dump",
    "import_targets",
    "import_tokens",
    "prepare",
    "rollout",
    "score",
]

# Where the names that are imported on demand come from.
_LAZY = {"StoppedError": "job"}


def prepare(config: PrepareConfig) -> PrepareSummary:
    """Text files or a Hugging Face data set -> tokens stores; see potstill.teacher_dump.preparing."""
    from potstill.teacher_dump import preparing

    return preparing.prepare(config)


def import_tokens(config: ImportTokensConfig) -> PrepareSummary:
    """Token ids that another program wrote -> tokens stores; see potstill.teacher_dump.importing.tokens.run."""
    from potstill.teacher_dump.importing.tokens import run

    return run.import_tokens(config)


def import_targets(config: ImportTargetsConfig) -> ImportTargetsSummary:
    """Targets that another program wrote -> targets store; see potstill.teacher_dump.importing.targets.run."""
    from potstill.teacher_dump.importing.targets import run

    return run.import_targets(config)


def dump(
    config: DumpConfig,
    worker: int | None = None,
    num_workers: int | None = None,
    *,
    only_rows: RowsOf | None = None,
    runner: Runner | None = None,
) -> WorkerSummary | SeriesSummary:
    """Teacher over a tokens store -> targets store; see potstill.teacher_dump.dumping."""
    from potstill.teacher_dump.early import early_dump

    config = early_dump(config)
    from potstill.teacher_dump import dumping

    return dumping.dump(config, worker, num_workers, only_rows=only_rows, runner=runner)


def score(config: ScoreConfig, worker: int | None = None, num_workers: int | None = None) -> WorkerSummary:
    """Small language model over a tokens store -> scores store; see potstill.teacher_dump.scoring."""
    from potstill.teacher_dump.early import early_score

    config = early_score(config)
    from potstill.teacher_dump import scoring

    return scoring.score(config, worker, num_workers)


def rollout(config: RolloutConfig, worker: int | None = None, num_workers: int | None = None) -> RolloutSummary:
    """A model's own answers to the prompts of a tokens store, graded; see potstill.teacher_dump.rollouts.run."""
    from potstill.teacher_dump.early import early_rollout

    config = early_rollout(config)
    from potstill.teacher_dump.rollouts import run

    return run.rollout(config, worker, num_workers)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"potstill.teacher_dump.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
