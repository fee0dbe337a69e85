"""The student stage: curriculum, selectors, DeepSpeed train loop, checkpoints, evaluation, export.

For a loop of one's own: `collate_rows` makes tensors of a loader's rows (docs/python.md). Nothing heavy is imported
until one of the functions is called or one of the classes is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.student_train.config.prune import PruneConfig
    from potstill.student_train.config.train import EvalConfig, ExportConfig, TrainConfig
    from potstill.student_train.data.packed import PackedBatch, collate_rows
    from potstill.student_train.evaluation.folder import EvalSummary
    from potstill.student_train.hf_export.hf_folder import ExportSummary
    from potstill.student_train.pruning.folder import PruneSummary
    from potstill.student_train.ray_loop import ray_train_loop
    from potstill.student_train.run.preflight import CheckedRun
    from potstill.student_train.run.summary import TrainSummary

__all__ = [
    "EvalConfig",
    "EvalSummary",
    "ExportConfig",
    "ExportSummary",
    "PackedBatch",
    "PruneConfig",
    "PruneSummary",
    "TrainConfig",
    "TrainSummary",
    "collate_rows",
    "evaluate",
    "export",
    "prune",
    "ray_train_loop",
    "train",
]

# Where the names that are imported on demand come from.
_LAZY = {
    "EvalConfig": "config.train",
    "EvalSummary": "evaluation.folder",
    "ExportConfig": "config.train",
    "ExportSummary": "hf_export.hf_folder",
    "PackedBatch": "data.packed",
    "PruneConfig": "config.prune",
    "PruneSummary": "pruning.folder",
    "TrainConfig": "config.train",
    "TrainSummary": "run.summary",
    "collate_rows": "data.packed",
    "ray_train_loop": "ray_loop",
}


def train(config: TrainConfig, *, checked: CheckedRun | None = None) -> TrainSummary:
    """Train or continue a student. The summary's `is_done` is False when the run was asked to stop early.

    `checked` is what preflight.check_run gave for this configuration in this process, if it was called already.
    """
    from potstill.student_train.run import trainer

    return trainer.train(config, checked=checked)


def evaluate(config: EvalConfig) -> EvalSummary:
    """Measure a run, a checkpoint or a Hugging Face folder on held-out rows."""
    from potstill.student_train.evaluation import folder

    return folder.evaluate(config)


def export(config: ExportConfig) -> ExportSummary:
    """Write a checkpoint as a Hugging Face folder and check it in a fresh process."""
    from potstill.student_train.hf_export import hf_folder

    return hf_folder.export(config)


def prune(config: PruneConfig) -> PruneSummary:
    """Write a Hugging Face folder with a part of a model's weights, which a student can start from."""
    from potstill.student_train.pruning import folder

    return folder.prune(config)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"potstill.student_train.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
