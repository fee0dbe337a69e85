"""Distances of one row, store against live and live against live, as the sums and extremes that a verdict needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potstill.storage import Row, TokensRow
from potstill.teacher_dump.against_teacher.measures import MEASURES
from potstill.teacher_dump.against_teacher.pairs import Float64, Pair, compared_places


@dataclass(frozen=True)
class Distance:
    """One measure over the positions of one row.

    stored, control: sums over the positions, of the store against the first live run and of that against the second.
    control_squares: sum of the squares of the latter. worst, at: the largest distance of the store from the nearer of
    the two runs, and its token. control_worst: the largest of the live runs from each other.
    """

    stored: float
    control: float
    control_squares: float
    worst: float
    at: int
    control_worst: float


@dataclass(frozen=True)
class RowDistances:
    """What was found of one row. positions: those compared; lacking: tokens where one side has no target, in order."""

    row: int
    positions: int
    lacking: tuple[int, ...]
    of: dict[str, Distance]
    grid_kl: float | None  # sum over the positions: what the grid alone costs, KL of live as stored to live


def row_distances(tokens: TokensRow, *, stored: Row, live: Row, again: Row, exact: Row) -> RowDistances:
    """Compare the versions of a row: as it is stored, and of two live runs as they would be stored.

    exact: the first live run before it is brought to the grids.
    """
    places, lacking = compared_places(tokens, (stored, live, again))
    first, second, control = (Pair(a, b, places) for a, b in ((stored, live), (stored, again), (live, again)))
    found: dict[str, Distance] = {}
    for name, measure in MEASURES.items():
        each = [measure.of(pair) for pair in (first, second, control)] if len(places) else [None]
        if not any(one is None for one in each):
            found[name] = _distance(places, *[one for one in each if one is not None])
    kl = MEASURES["kl"].of(Pair(live, exact, places)) if len(places) else None
    grid_kl = None if kl is None else float(kl.sum())
    return RowDistances(tokens.row, len(places), tuple(map(int, lacking)), found, grid_kl)


def _distance(places: NDArray[np.int64], first: Float64, second: Float64, control: Float64) -> Distance:
    nearer = np.minimum(first, second)
    at = int(nearer.argmax())
    return Distance(
        stored=float(first.sum()),
        control=float(control.sum()),
        control_squares=float((control**2).sum()),
        worst=float(nearer[at]),
        at=int(places[at]),
        control_worst=float(control.max()),
    )
