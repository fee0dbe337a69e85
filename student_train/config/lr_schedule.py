"""The learning rate's schedule: a linear warm-up, then one of the shapes of the table LR_SHAPES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from potstill.common.config import StrictModel
from potstill.common.named_entries import NameIn
from potstill.student_train.config.curves import DECAY_SHAPES, DecayShape

Span = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)]


def span_steps(span: Span, total_steps: int) -> int:
    """Turn a length into steps: an int is a number of steps, a float a share of `total_steps` (rounded)."""
    return span if isinstance(span, int) else round(span * total_steps)


@dataclass(frozen=True)
class LrShape:
    """What follows the warm-up: 1 until the decay begins, then a fall to `min_ratio` at the end.

    decay_steps(schedule, total, after): steps of the decay, of `total` steps, of which `after` follow the warm-up;
    None never decays. falls(schedule): the fall from 1 to 0 over the share of the decay that is done.
    """

    decay_steps: Callable[[LrSchedule, int, int], int] | None
    falls: Callable[[LrSchedule], Callable[[float], float]]


def _all_after_warmup(schedule: LrSchedule, total: int, after: int) -> int:
    return after


def _given_decay(schedule: LrSchedule, total: int, after: int) -> int:
    return span_steps(schedule.decay, total)


LR_SHAPES: dict[str, LrShape] = {
    "constant": LrShape(None, lambda schedule: DECAY_SHAPES["linear"]),
    "linear": LrShape(_all_after_warmup, lambda schedule: DECAY_SHAPES["linear"]),
    "cosine": LrShape(_all_after_warmup, lambda schedule: DECAY_SHAPES["cosine"]),
    "wsd": LrShape(_given_decay, lambda schedule: DECAY_SHAPES[schedule.decay_shape]),
}


class LrSchedule(StrictModel):
    """Learning rate over the run or over each stage, a pure function of the step."""

    kind: Annotated[str, NameIn(LR_SHAPES)] = Field(default="cosine", description="Shape after the warm-up")
    span: Literal["run", "stages"] = Field(
        default="run", description="What the shape is laid over: the run, or each stage of the curriculum anew"
    )
    warmup: Span = Field(default=0, description="Linear warm-up: int = steps, float = share of the run (or stage)")
    decay: Span = Field(
        default=0.2,
        description="Length of the decay of wsd at the end: int = steps, float = share of the run (or stage)",
    )
    decay_shape: DecayShape = Field(default="linear", description="Shape of the decay of wsd")
    min_ratio: float = Field(default=0.1, ge=0, le=1, description="Factor on the peak that the decay ends at")

    def factor(self, step: int, total_steps: int) -> float:
        """Factor on the peak learning rate for step 0..total_steps-1 (0 counts: the first step already moves).

        Warm-up is linear and reaches 1 at its last step. `cosine` and `linear` fall to `min_ratio` at `total_steps`.
        `wsd` (warm-up, stable, decay) stays at 1 until `decay` steps before the end: the stable phase does not know
        the total, so one checkpoint of it can be branched into many decays by changing `run.max_steps` alone.
        """
        warmup = span_steps(self.warmup, total_steps)
        if step < warmup:
            return (step + 1) / warmup
        shape = LR_SHAPES[self.kind]
        if shape.decay_steps is None:
            return 1.0
        start = max(total_steps - shape.decay_steps(self, total_steps, total_steps - warmup), warmup)
        if step < start:
            return 1.0
        done = min((step - start) / max(total_steps - start, 1), 1.0)
        return self.min_ratio + (1.0 - self.min_ratio) * shape.falls(self)(done)

    def factor_at(self, step: int, *, total_steps: int, first_step: int, end_step: int) -> float:
        """Factor at `step` of a run of `total_steps`, in its stage [first_step, end_step).

        With `span: stages` each stage is a schedule of its own (POCL, arXiv 2506.05695): lengths count from its first
        step, shares are of its length. The last stage ends with the run.
        """
        if self.span == "stages":
            return self.factor(step - first_step, end_step - first_step)
        return self.factor(step, total_steps)
