"""The parts that one training run works with. The set is fixed from its start; each part keeps its own state."""

from __future__ import annotations

from dataclasses import dataclass

from potstill.student_train.evaluation.heldout import HeldoutEvaluation, SourcesEvaluation
from potstill.student_train.evaluation.samples import TextSampler
from potstill.student_train.run.metrics import Meter, MetricsLog
from potstill.student_train.run.run_base import RunBase
from potstill.student_train.run.saves import Saves
from potstill.student_train.run.step_watch import StepWatch
from potstill.student_train.run.train_lines import TrainLines


class SelfChecks:
    """Says when the loss path is to be compared with float64: at the first step of each stage in this process."""

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted
        self._checked_stages: set[int] = set()

    def due(self, stage: int) -> bool:
        """True for the first micro-batch of a stage, if self-checks are wanted."""
        due = self._wanted and stage not in self._checked_stages
        self._checked_stages.add(stage)
        return due


@dataclass(frozen=True)
class Run(RunBase):
    """Everything one training process works with."""

    watch: StepWatch
    self_checks: SelfChecks
    meter: Meter
    metrics: MetricsLog
    lines: TrainLines
    saves: Saves
    evaluation: HeldoutEvaluation | SourcesEvaluation | None
    sampler: TextSampler | None
    num_parameters: int
