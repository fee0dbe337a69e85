"""The student stage: curriculum, selectors, DeepSpeed train loop, checkpoints, evaluation, export.

Nothing heavy is imported until one of the functions is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.student_train.config import EvalConfig, ExportConfig, TrainConfig
    from potstill.student_train.export_hf import ExportSummary
    from potstill.student_train.measure import EvalSummary
    from potstill.student_train.preflight import CheckedRun
    from potstill.student_train.summary import TrainSummary

__all__ = ["EvalConfig", "ExportConfig", "TrainConfig", "evaluate", "export", "train"]


def train(config: TrainConfig, *, checked: CheckedRun | None = None) -> TrainSummary:
    """Train or continue a student. The summary's `is_done` is False when the run was asked to stop early.

    `checked` is what preflight.check_run gave for this configuration in this process, if it was called already.
    """
    from potstill.student_train import trainer

    return trainer.train(config, checked=checked)


def evaluate(config: EvalConfig) -> EvalSummary:
    """Measure a run, a checkpoint or a Hugging Face folder on held-out rows."""
    from potstill.student_train import measure

    return measure.evaluate(config)


def export(config: ExportConfig) -> ExportSummary:
    """Write a checkpoint as a Hugging Face folder and check it in a fresh process."""
    from potstill.student_train import export_hf

    return export_hf.export(config)


def __getattr__(name: str) -> Any:
    if name in ("EvalConfig", "ExportConfig", "TrainConfig"):
        from potstill.student_train import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
