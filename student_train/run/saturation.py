"""Move on to the teacher's next checkpoint when the student has learned what the last one had for it.

"Progressive distillation induces an implicit curriculum", arXiv 2410.05464, by the rule of its code for parity: at each
evaluation, where the figure gains less than `min_gain` over the mean of the `window` evaluations before it, and has
gained more than that since the last switch; or where one store was learned from for `max_steps` steps. Before the first
switch the gain is counted from the first such mean. The clock is in config/clocks.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from potstill.common.errors import UserError
from potstill.student_train.config.clocks import TargetsClock
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.curriculum.plan import CurriculumPlan
from potstill.student_train.curriculum.segments import StageSpan
from potstill.student_train.run.legs import DecisionPoint
from potstill.student_train.run.preflight import CheckedRun

log = logging.getLogger(__name__)
NAME = "targets_clock"
WINDOW, MIN_GAIN, FIGURE = 5, 0.01, "accuracy"  # of the paper's code


@dataclass
class Watched:
    """What is known of a stage with such a clock. switched: steps of the stage at which it took the next store.

    recent: the figure at the last evaluations, the newest last; start: what gains are counted from.
    """

    switched: list[int] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    start: float | None = None

    def takes_next(self, clock: TargetsClock, step: int, figure: float) -> bool:
        """Note the figure of the evaluation before step `step` of the stage; whether the next store is due."""
        window = WINDOW if clock.window is None else clock.window
        min_gain = MIN_GAIN if clock.min_gain is None else clock.min_gain
        before, self.recent = self.recent, [*self.recent, figure][-window:]
        last = self.switched[-1] if self.switched else 0
        due = clock.max_steps is not None and step - last >= clock.max_steps
        if len(before) == window:
            mean = sum(before) / window
            self.start = mean if self.start is None else self.start
            due = due or (figure - mean < min_gain and figure - self.start > min_gain)
        if due:
            self.switched.append(step)
            self.start = figure
        return due


class SaturationSwitch:
    """Decides at each evaluation within a stage of this clock, until it has come to its last store (legs.Decider)."""

    name = NAME

    def __init__(self, plan: CurriculumPlan, every_steps: int) -> None:
        """`plan`: of the run, as its configuration has it; `every_steps`: between two evaluations."""
        self.decided_step: int | None = None
        self._plan, self._every = plan, every_steps
        self._watched = {span.index: Watched() for span in plan.spans if _saturates(span)}

    def next_step(self, step: int) -> int | None:
        """The next evaluation within a stage that has stores left."""
        for span in self._plan.spans:
            if span.index in self._watched and self._stores_left(span.index):
                found = max(-(-step // self._every), span.first_step // self._every + 1) * self._every
                if found < span.end_step:
                    return found
        return None

    def decide(self, at: DecisionPoint) -> dict[str, Any] | None:
        """Look at the newest figure; a line of metrics where the next store is taken. Raises UserError: no figure."""
        self.decided_step = at.step
        span = self._plan.segment(at.step).span
        clock, watched, within = span.stage.targets_clock, self._watched[span.index], at.step - span.first_step
        assert clock is not None
        name = FIGURE if clock.figure is None else clock.figure
        value = None if at.heldout is None else at.heldout.get(name)
        if not isinstance(value, float):
            numbers = sorted(key for key, found in (at.heldout or {}).items() if isinstance(found, float))
            raise UserError(
                f"curriculum.{span.index}.targets_clock.figure is {name!r}; the evaluation before step {at.step} has "
                f"the figures {numbers}; name one that it has, or give the evaluation what this one needs (masks, "
                "data.heldout_targets, eval.answers)"
            )
        before = self._clock(span.index).store(within)
        if not watched.takes_next(clock, within, value):
            return None
        after = self._clock(span.index).store(within)
        if at.run.topology.is_main:
            log.info("step %d: %s is %.4f; from here on targets %s, after %s", at.step, name, value, after, before)
        return {"stage": span.name, "figure": name, "value": value, "from": before, "to": after}

    def in_plan(self, plan: CurriculumPlan) -> CurriculumPlan:
        """The plan with the stores that were taken so far."""
        return plan.with_clocks({index: self._clock(index) for index in self._watched})

    def write(self, folder: Path) -> dict[str, Any]:
        """All of it, for the manifest."""
        stages = {str(index): asdict(watched) for index, watched in self._watched.items()}
        return {"decided_step": self.decided_step, "stages": stages}

    def read(self, folder: Path, saved: Mapping[str, Any]) -> None:
        """Take back what `write` returned. Raises UserError where the stages with such a clock are others now."""
        found, expected = sorted(saved["stages"]), sorted(map(str, self._watched))
        if found != expected:
            raise UserError(
                f"{folder}: the checkpoint has a clock of switch_on saturation in the stages {found}, the "
                f"configuration in {expected}; use the run's own curriculum, or start a new run"
            )
        self.decided_step = saved["decided_step"]
        self._watched = {int(index): Watched(**values) for index, values in saved["stages"].items()}

    def _clock(self, index: int) -> Any:
        return replace(self._plan.clocks[index], switched=tuple(self._watched[index].switched))

    def _stores_left(self, index: int) -> bool:
        return len(self._watched[index].switched) < len(self._plan.clocks[index].stores) - 1


def _saturates(span: StageSpan) -> bool:
    clock = span.stage.targets_clock
    return clock is not None and clock.switch_on == "saturation"


def saturation_switch(config: TrainConfig, checked: CheckedRun) -> SaturationSwitch | None:
    """The decider of a run that has such a clock; the configuration has seen that it has evaluations."""
    if not any(_saturates(span) for span in checked.plan.spans):
        return None
    assert config.eval.every_steps is not None
    return SaturationSwitch(checked.plan, config.eval.every_steps)
