"""The clock of a stage with its stores in order: which of them each step learns from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from potstill.common.errors import UserError
from potstill.student_train.config.clocks import SWITCHES, TargetsClock


@dataclass(frozen=True)
class StageClock:
    """Stores by the teacher's step, least first. Steps are those of the stage, from 0 on.

    switched: steps at which it moved on to the next store, in order; of switch_on saturation, decided during the run.
    """

    config: TargetsClock
    stores: tuple[str, ...]
    teacher_steps: tuple[int, ...]
    switched: tuple[int, ...] = ()

    @property
    def is_decided(self) -> bool:
        """Whether the run decides when it moves on, so that no step is known before."""
        return SWITCHES[self.config.switch_on].decided

    def number(self, step: int) -> int:
        """Number of the store that step `step` learns from."""
        found = SWITCHES[self.config.switch_on].number(self.config, self.teacher_steps, self.switched, step)
        return min(found, len(self.stores) - 1)

    def store(self, step: int) -> str:
        """Name of the store that step `step` learns from."""
        return self.stores[self.number(step)]

    def parts(self, num_steps: int) -> Iterator[tuple[int, str, int]]:
        """First step, store and teacher step of each part of the first `num_steps` steps, as far as it is decided."""
        number = self.number(0)
        yield 0, self.stores[number], self.teacher_steps[number]
        for step in SWITCHES[self.config.switch_on].looks(self.config, self.switched, num_steps):
            if number == len(self.stores) - 1:
                return
            if (found := self.number(step)) != number:
                number = found
                yield step, self.stores[number], self.teacher_steps[number]


def stage_clock(
    config: TargetsClock, names: Sequence[str], recorded: Mapping[str, Mapping[str, int | None]], *, key: str
) -> StageClock:
    """Put the stores of a clock in order.

    recorded: by source and name the teacher's step that the store itself says, None where it does not. Raises
    UserError naming the key and the store where a step is not known, is another in two sources, or comes twice.
    """
    steps: dict[str, int] = {}
    for name, given in config.given_steps(names).items():
        found = {source: own[name] for source, own in recorded.items() if name in own} if given is None else {}
        if given is not None:
            steps[name] = given
            continue
        known = {step for step in found.values() if step is not None}
        if len(known) != 1:
            what = "no step in the teacher's name" if not known else f"the steps {found} by source"
            raise UserError(f"{key}.stores.{name} is null, and the store says {what}; give the teacher's step there")
        steps[name] = known.pop()
    ordered = sorted(steps, key=lambda name: steps[name])
    numbers = tuple(steps[name] for name in ordered)
    for before, after in pairwise(ordered):
        if steps[before] == steps[after]:
            raise UserError(f"{key}: the stores {before!r} and {after!r} are both of teacher step {steps[after]}")
    return StageClock(config, tuple(ordered), numbers)
