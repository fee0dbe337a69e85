"""A mixture of sources as a pure function: which source position p draws from, and how many of its rows came before.

MIXTURE_VERSION 1 is pinned by a golden list in the tests; a change of any bit needs a new version number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from potstill.storage.errors import StoreError
from potstill.storage.loading.order import Int64, RowOrder

MIXTURE_VERSION = 1
# Weights are whole numbers that sum to at most this: the product of two of them fits into 64 bits.
_LARGEST_SUM = (1 << 32) - 1
_SHARE_SUM = 1 << 30  # shares are rounded to multiples of 1 / this


class Mixture:
    """Positions 0, 1, 2, ... shared out among sources by whole-number weights, as evenly as counting allows.

    The sources are split off one after the other, heaviest first: of the first r positions that are left, a source of
    weight q of R left has round(r q / R), the balanced word of Bresenham ("Algorithm for computer control of a digital
    plotter", 1965) and Christoffel. So after any n positions each of S sources is within (1 + H) / 2 rows of its share
    of n, H = 1 + 1/2 + ... + 1/(S - 1): each split adds at most 1/2, scaled down by what is left. After every
    sum(weights) positions it is exact. O(number of sources) memory and time per position, whatever the number.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        """`weights`: a whole number from 0 on for each source, at least one above 0 (see `whole_weights`)."""
        values = [int(weight) for weight in weights]
        if min(values, default=-1) < 0 or not 0 < sum(values) <= _LARGEST_SUM:
            raise StoreError(f"mixture: weights {values}; expected numbers from 0 on with a sum in [1, {_LARGEST_SUM}]")
        self.weights = tuple(values)
        self._sum = sum(values)
        # Heaviest first, which is what bounds the error; equal ones by number.
        self._order = sorted((n for n in range(len(values)) if values[n]), key=lambda n: (-values[n], n))

    def at(self, positions: ArrayLike) -> tuple[Int64, Int64]:
        """(source, number of positions before it that are of the same source) of each position, int64 like it."""
        flat = np.asarray(positions, np.int64)
        blocks, inside = np.divmod(flat, self._sum)
        source: Int64 = np.full(flat.shape, self._order[-1], np.int64)
        before: Int64 = np.empty(flat.shape, np.int64)
        left, total, open_ = inside.astype(np.uint64), self._sum, np.ones(flat.shape, bool)
        for number in self._order[:-1]:
            weight = self.weights[number]
            earlier = _rounded(left, weight, total)
            is_it = open_ & (_rounded(left + np.uint64(1), weight, total) > earlier)
            source[is_it], before[is_it] = number, earlier[is_it]
            open_ &= ~is_it
            # Where the source is found already, what is left stays within its bounds and is not looked at again.
            left, total = np.where(open_, left - earlier, np.uint64(0)), total - weight
        before[open_] = left[open_]
        whole: Int64 = blocks * np.array(self.weights, np.int64)[source]
        return source, before + whole

    def counts(self, num_positions: int) -> Int64:
        """How many of the first `num_positions` are of each source, int64 [sources]."""
        blocks, left = divmod(num_positions, self._sum)
        found = np.array(self.weights, np.int64) * blocks
        total = self._sum
        for number in self._order:
            earlier = (left * self.weights[number] + total // 2) // total
            found[number] += earlier
            left, total = left - earlier, total - self.weights[number]
        return found


def _rounded(left: NDArray[np.uint64], weight: int, total: int) -> NDArray[np.uint64]:
    """round(left * weight / total), halves up; left <= total < 2^32, so the product fits."""
    found: NDArray[np.uint64] = (left * np.uint64(weight) + np.uint64(total // 2)) // np.uint64(total)
    return found


def whole_weights(shares: Sequence[float]) -> tuple[int, ...]:
    """Weights of a Mixture from shares of any sum; a source of a share above 0 always gets some.

    Shares are taken as the decimal numbers that they are written as: 0.5, 0.3 and 0.2 give 5, 3 and 2. Where the common
    denominator is too large for that, weights are rounded to multiples of 1 / 2^30 of the sum (largest remainder, ties
    by number). Raises StoreError for a share that is negative or no number, and where all are 0.
    """
    if any(not math.isfinite(share) or share < 0 for share in shares) or not any(shares):
        raise StoreError(f"mixture: shares {list(shares)}; expected numbers from 0 on, at least one above 0")
    exact = [Fraction(str(share)) for share in shares]
    common = math.lcm(*(value.denominator for value in exact))
    whole = [int(value * common) for value in exact]
    divisor = math.gcd(*whole)
    if sum(whole) // divisor <= _LARGEST_SUM:
        return tuple(weight // divisor for weight in whole)
    total = sum(exact)
    wanted = [value * _SHARE_SUM / total for value in exact]
    found = [max(math.floor(value), 1) if value > 0 else 0 for value in wanted]
    missing = max(_SHARE_SUM - sum(found), 0)
    for number in sorted(range(len(wanted)), key=lambda n: (found[n] - wanted[n], n))[:missing]:
        found[number] += wanted[number] > 0
    return tuple(found)


@dataclass(frozen=True)
class Draw:
    """How rows are drawn from one source.

    order: of its rows, or of the rows of `pool` (their ids in the source, ascending, of any integer type; None: all).
    first_row: its first row's global id. start: place in the order, through all epochs, of the first row that is drawn.
    """

    order: RowOrder
    first_row: int = 0
    start: int = 0
    pool: NDArray[np.integer] | None = None

    def rows(self, places: Int64) -> Int64:
        """Global ids of the rows at these places behind `start`."""
        found = self.order.endless(self.start + places)
        return self.first_row + (found if self.pool is None else self.pool[found].astype(np.int64))

    def holds(self, row: int) -> bool:
        """Whether the row of this global id may be drawn."""
        inner = row - self.first_row
        if self.pool is None:
            return 0 <= inner < self.order.num_rows
        place = int(np.searchsorted(self.pool, inner))
        return place < len(self.pool) and int(self.pool[place]) == inner


class MixedOrder:
    """Row ids at positions 0, 1, 2, ... of a mixture, without end: each source's rows in their own order, in turn."""

    def __init__(self, mixture: Mixture, draws: Sequence[Draw | None]) -> None:
        """`draws`: one for each source of the mixture; None where its weight is 0."""
        self.mixture, self.draws = mixture, tuple(draws)
        self._only = next(iter(self.used())) if len(self.used()) == 1 else None

    def used(self) -> dict[int, Draw]:
        """The draws by number of their source, without those that nothing is drawn from."""
        pairs = zip(self.draws, self.mixture.weights, strict=True)
        return {number: draw for number, (draw, weight) in enumerate(pairs) if draw is not None and weight}

    def rows(self, positions: ArrayLike) -> Int64:
        """Global row ids at `positions` (one axis)."""
        flat = np.asarray(positions, np.int64)
        if self._only is not None:
            return self.used()[self._only].rows(flat)
        sources, before = self.mixture.at(flat)
        found = np.empty_like(flat)
        for number, draw in self.used().items():
            here = sources == number
            found[here] = draw.rows(before[here])
        return found


def source_seed(seed: int, name: str) -> int:
    """Seed of a source's own order: of its name, so that it does not depend on which sources stand beside it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")
