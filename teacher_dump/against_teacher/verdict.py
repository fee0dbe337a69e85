"""The verdict: whether a store is as near to its live teacher as that is to itself, over all rows, by row, by position.

A distance is allowed up to the larger of what the grid of the store makes and twice what the live teacher differs from
itself in other batches; where the store was dumped on another machine, up to what its dtype's rounding makes there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from potstill.storage import RunSpec
from potstill.teacher_dump.against_teacher.distances import RowDistances
from potstill.teacher_dump.against_teacher.measures import MEASURES, Measure

# Shares of a grid step that log-probabilities may be apart in mean: over a row as in engine_mix.py, over all less.
OF_ALL, OF_ROW, OF_POSITION = 1 / 64, 1 / 16, 2.0
_EVENTS = 3  # positions that may be an `event` apart, so that few positions are not judged by one of them
_OF_ITSELF = 2.0  # times what the teacher differs from itself in other batches, as in engine_mix.py
_SIGMAS = 4.0  # of the control's mean over so many positions
# Nats that log-probabilities of one set of weights are apart on other hardware, in units of the dtype's rounding. Of
# six layers in bfloat16 2.5 were measured in mean (attention eager or sdpa), and the unit of 80 layers is three times
# that; at single positions it is a multiple.
_UNITS, _UNITS_OF_POSITION = 8.0, 64.0
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Bound:
    """How far apart is allowed, and why: `grid`, `rounding` or `control`, whichever allows most."""

    value: float
    because: str


@dataclass(frozen=True)
class Excess:
    """A distance above its bound. row None: over all rows; token None: over the row."""

    measure: str
    row: int | None
    token: int | None
    found: float
    bound: float

    def text(self) -> str:
        """One line for a person."""
        where = "over all rows" if self.row is None else f"row {self.row}"
        where += "" if self.token is None else f", token {self.token}"
        return f"{where}: {MEASURES[self.measure].words}: {self.found:.3g}, allowed are {self.bound:.3g}"


@dataclass(frozen=True)
class Overall:
    """One measure over all positions: store against live, live against live, and the bound (None: not judged by)."""

    stored: float
    control: float
    bound: Bound | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """What was decided: `excesses` is empty where the store agrees.

    others_agree: whether without the rows that have one of their own the others, one at least, would agree.
    """

    overall: dict[str, Overall]
    excesses: tuple[Excess, ...]
    others_agree: bool

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows that have an excess of their own, in the order of `excesses`."""
        return tuple(dict.fromkeys(one.row for one in self.excesses if one.row is not None))


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Bounds for one store. rounding: the dtype whose rounding on another machine is allowed for; None: it is not."""

    spec: RunSpec
    rounding: str | None
    rows: Sequence[RowDistances]

    def verdict(self) -> Verdict:
        """Hold every measure against its bounds."""
        overall: dict[str, Overall] = {}
        excesses: list[Excess] = []
        for name, measure in MEASURES.items():
            rows = [row for row in self.rows if name in row.of]
            if not rows:
                continue
            num = sum(row.positions for row in rows)
            stored, control = (sum(getattr(row.of[name], key) for row in rows) / num for key in ("stored", "control"))
            if measure.slope is None:
                overall[name] = Overall(stored, control, None)
                continue
            squares = sum(row.of[name].control_squares for row in rows) / num
            spread = math.sqrt(max(0.0, squares - control**2))
            bound = self._mean(measure, num, OF_ALL, control=control, spread=spread)
            overall[name] = Overall(stored, control, bound)
            if stored > bound.value:
                excesses.append(Excess(name, None, None, stored, bound.value))
            excesses += self._by_row(measure, rows, control=control, spread=spread)
            if measure.single:
                excesses += self._by_position(measure, rows)
        return Verdict(overall, tuple(excesses), self._others_agree(excesses))

    def _others_agree(self, excesses: Sequence[Excess]) -> bool:
        out = {one.row for one in excesses}
        others = [row for row in self.rows if row.row not in out]
        if not others or len(others) == len(self.rows):
            return not excesses
        return not replace(self, rows=others).verdict().excesses

    def _by_row(self, measure: Measure, rows: Sequence[RowDistances], *, control: float, spread: float) -> list[Excess]:
        found = []
        for row in rows:
            own = row.of[measure.name]
            itself = max(control, own.control / row.positions)
            bound = self._mean(measure, row.positions, OF_ROW, control=itself, spread=spread)
            if own.stored / row.positions > bound.value:
                found.append(Excess(measure.name, row.row, None, own.stored / row.positions, bound.value))
        return sorted(found, key=lambda one: -one.found / one.bound)

    def _by_position(self, measure: Measure, rows: Sequence[RowDistances]) -> list[Excess]:
        of_itself = max(row.of[measure.name].control_worst for row in rows)
        # One step down and one up are not the same distance: a step is what its larger side makes.
        bound = max(
            OF_POSITION * measure.of_step(self.spec), self._rounding(measure, _UNITS_OF_POSITION), 2 * of_itself
        )
        worst = [(row.row, row.of[measure.name]) for row in rows if row.of[measure.name].worst > bound]
        worst.sort(key=lambda item: -item[1].worst)
        return [Excess(measure.name, row, own.at, own.worst, bound) for row, own in worst]

    def _mean(self, measure: Measure, num: int, share: float, *, control: float, spread: float) -> Bound:
        """Bound of a mean over `num` positions."""
        each = {
            "grid": max(measure.of_step(self.spec, share), _EVENTS * measure.of_event(self.spec) / num),
            "rounding": self._rounding(measure, _UNITS),
            "control": _OF_ITSELF * control + _SIGMAS * spread / math.sqrt(num),
        }
        because = max(each, key=lambda name: each[name])
        return Bound(each[because], because)

    def _rounding(self, measure: Measure, units: float) -> float:
        assert measure.slope is not None
        if self.rounding is None:
            return 0.0
        unit = ROUNDING.get(self.rounding, ROUNDING["bfloat16"])  # quantised weights compute in bfloat16
        return measure.slope * math.expm1(units * unit)
