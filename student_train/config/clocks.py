"""Clocks of a stage: which checkpoint of one teacher each step learns from, early ones first.

"Progressive distillation induces an implicit curriculum", arXiv 2410.05464. How a clock moves on is an entry of the
table SWITCHES; the configuration reads this table, so nothing heavy is imported with it.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, model_validator

from potstill.common.config import StrictModel
from potstill.common.named_entries import NameIn

Steps = Sequence[int]

# Figures of evaluations of which more is better: by the others a clock would wait for a loss to rise.
RISING_FIGURES = {
    "accuracy": "share of the labels that are the most probable token",
    "agreement": "share of positions with the teacher's most probable token (data.heldout_targets)",
    "answer_accuracy": "share of the answers of which every token is right (masks)",
    "answer_exact": "share of the written answers that are the reference (eval.answers)",
    "answer_grade": "mean grade of the written answers (eval.answers.grader)",
    "answer_pass_rate": "share of the written answers that pass (eval.answers.grader)",
}


def _number_by_step(clock: TargetsClock, teacher_steps: Steps, switched: Steps, step: int) -> int:
    """The store of the wanted teacher step, or of the next later one."""
    return bisect_left(teacher_steps, clock.wanted_step(step))


def _looks_by_step(clock: TargetsClock, switched: Steps, num_steps: int) -> Steps:
    """Once in `refresh` steps."""
    return range(clock.refresh or num_steps, num_steps, clock.refresh or 1)


def _number_as_decided(clock: TargetsClock, teacher_steps: Steps, switched: Steps, step: int) -> int:
    """One further for each decision (run/saturation.py)."""
    return bisect_right(switched, step)


def _looks_as_decided(clock: TargetsClock, switched: Steps, num_steps: int) -> Steps:
    return [step for step in switched if step < num_steps]


@dataclass(frozen=True)
class Switch:
    """One way of moving on from store to store. Steps are those of the stage, from 0 on.

    number(clock, teacher_steps, switched, step): number of the store at a step, of stores by rising teacher step;
    beyond the last is the last. switched: the steps at which the run decided to move on. looks(clock, switched,
    num_steps): the steps behind 0 at which the number may change. needs: keys of the clock that it cannot do without;
    takes: further keys of its own; decided: whether it is decided during the run, by the figures of evaluations.
    """

    number: Callable[[TargetsClock, Steps, Steps, int], int]
    looks: Callable[[TargetsClock, Steps, int], Steps]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    decided: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.needs, *self.takes)


SWITCHES: dict[str, Switch] = {
    "step": Switch(_number_by_step, _looks_by_step, needs=("refresh",), takes=("speed", "offset")),
    "saturation": Switch(
        _number_as_decided, _looks_as_decided, takes=("figure", "window", "min_gain", "max_steps"), decided=True
    ),
}


class TargetsClock(StrictModel):
    """Stores of one teacher's checkpoints, and when a stage moves on from one to the next.

    step: at step t of the stage (from 0) the wanted teacher step is speed * (1 + floor(t / refresh)) * refresh +
    offset; with speed < 1 it is (1 + floor(speed * floor(t / refresh))) * refresh + offset, as the paper's code has it.
    It is served by the store of that teacher step, or the next later one where there is none (the rule of the paper's
    code for parity; that for grammars takes the one before), and by the last one when all are behind.

    saturation: at each evaluation of the run. The first store is left for the next when the figure is less than
    min_gain above the mean of the `window` evaluations before it, and at least min_gain above where it was at the last
    switch (the paper's rule, of accuracy), or after max_steps steps of one store.
    """

    stores: dict[str, Annotated[int, Field(ge=0)] | None] = Field(
        default_factory=dict,
        description="Name in data.targets -> step of the teacher that it is of; null: as the store says it",
    )
    prefix: str | None = Field(
        default=None,
        min_length=1,
        description="In place of stores: all of data.targets whose name is this and a number, the teacher's step",
    )
    switch_on: Annotated[str, NameIn(SWITCHES)] = Field(
        default="step", description="step: by the student's step; saturation: when a held-out figure stops rising"
    )
    refresh: int | None = Field(default=None, ge=1, description="step: steps between two looks at the clock")
    speed: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="step: teacher steps to one of the student (1)"
    )
    offset: int | None = Field(default=None, ge=0, description="step: teacher steps that are left out at first (0)")
    figure: Annotated[str, NameIn(RISING_FIGURES)] | None = Field(
        default=None, description="saturation: figure of the evaluations, of which more is better (accuracy)"
    )
    window: int | None = Field(default=None, ge=1, le=1000, description="saturation: evaluations of its mean (5)")
    min_gain: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="saturation: gain below which it has stopped (0.01)"
    )
    max_steps: int | None = Field(
        default=None, ge=1, description="saturation: most steps of one store but the last; null: no bound (paper: 2M)"
    )

    @model_validator(mode="after")
    def _check(self) -> TargetsClock:
        if bool(self.stores) == (self.prefix is not None):
            raise ValueError("targets_clock: give one of stores and prefix")
        entry = SWITCHES[self.switch_on]
        for key in entry.needs:
            if getattr(self, key) is None:
                raise ValueError(f"targets_clock.{key} is missing: switch_on {self.switch_on} needs it")
        for name, other in SWITCHES.items():
            for key in set(other.keys) - set(entry.keys):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"targets_clock.{key} belongs to switch_on {name}, found {self.switch_on}; remove it"
                    )
        given = [step for step in self.stores.values() if step is not None]
        twice = sorted({step for step in given if given.count(step) > 1})
        if twice:
            raise ValueError(f"targets_clock.stores: two stores are of teacher step {twice[0]}; keep one of them")
        return self

    def names(self, known: Iterable[str]) -> tuple[str, ...]:
        """Names of its stores among those that are known. Raises ValueError: prefix, and none begins so."""
        if self.prefix is None:
            return tuple(self.stores)
        known = list(known)
        found = tuple(name for name in known if self._number(name) is not None)
        if not found:
            raise ValueError(
                f"targets_clock.prefix is {self.prefix!r}; data.targets has {sorted(known)}, of which none is that and "
                f"a number, such as {self.prefix}1000"
            )
        return found

    def given_steps(self, names: Iterable[str]) -> Mapping[str, int | None]:
        """Teacher step of each of its stores as the configuration gives it; None is for the store to say."""
        return {name: self.stores[name] if self.prefix is None else self._number(name) for name in names}

    def _number(self, name: str) -> int | None:
        found = re.fullmatch(re.escape(self.prefix or "") + r"(\d+)", name)
        return None if found is None else int(found[1])

    def wanted_step(self, step: int) -> int:
        """Teacher step that step `step` of the stage asks for, of switch_on step."""
        assert self.refresh is not None
        speed, looks = 1.0 if self.speed is None else self.speed, step // self.refresh
        if speed < 1:
            wanted = (1 + math.floor(speed * looks)) * self.refresh
        else:
            wanted = math.floor(speed * (1 + looks) * self.refresh)
        return wanted + (self.offset or 0)

    def describe(self) -> str:
        """In words, for a person."""
        of = f"{self.prefix}*" if self.prefix is not None else ", ".join(self.stores)
        if self.switch_on == "step":
            offset = f", from {self.offset} on" if self.offset else ""
            return f"{of} by the teacher's step, refresh {self.refresh}, speed {self.speed or 1.0:g}{offset}"
        return f"{of}, the next on {self.switch_on}"
