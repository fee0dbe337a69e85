"""Two versions of one row side by side: what each says at the positions where both say something.

Legend: N tokens of a row, M positions compared, E entries of both, each (position, id) once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from potstill.storage import Row, ScoresRow, SparseTargets, TargetsRow, TokensRow

Float64 = NDArray[np.float64]
LEAST_MASS = float(np.exp(-254 / 16))  # the smallest tail of the grid: below it a store says nothing


@dataclass(frozen=True)
class Buckets:
    """Two distributions on the same buckets. place int64 [E] in 0..M-1; p, q [E]; rest_p, rest_q [M]: all other ids."""

    place: NDArray[np.int64]
    p: Float64
    q: Float64
    rest_p: Float64
    rest_q: Float64

    def sum(self, values: Float64) -> Float64:
        """Sums over the entries of each position, [M]."""
        return np.bincount(self.place, values, minlength=len(self.rest_p)).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Pair:
    """Row `a` (what is stored) and row `b` (what is live) of the same tokens; places int64 [M]."""

    a: Row
    b: Row
    places: NDArray[np.int64]

    def columns(self, name: str) -> tuple[Float64, Float64] | None:
        """A column of both at the positions, float64 [M] each; None where one of them lacks it."""
        found = [getattr(row.targets if isinstance(row, TargetsRow) else row, name, None) for row in (self.a, self.b)]
        if found[0] is None or found[1] is None:
            return None
        return found[0][self.places].astype(np.float64), found[1][self.places].astype(np.float64)

    @cached_property
    def targets(self) -> tuple[SparseTargets, SparseTargets] | None:
        """Of targets: the entries of both."""
        if isinstance(self.a, TargetsRow) and isinstance(self.b, TargetsRow):
            return self.a.targets, self.b.targets
        return None

    @cached_property
    def buckets(self) -> Buckets | None:
        """The distributions of two rows of log-probabilities on common buckets, see `_completed`; None of others."""
        if self.targets is None or any(one.logprobs is None for one in self.targets):
            return None
        keys = [_keys(one, self.places) for one in self.targets]
        both = np.unique(np.concatenate([key for key, _ in keys]))
        place = both >> 32
        own = np.zeros((2, len(both)))
        for line, (key, mass) in zip(own, keys, strict=True):
            line[np.searchsorted(both, key)] = mass  # ids are distinct within a token: no place is named twice
        tails = [np.exp(one.log_tail[self.places].astype(np.float64)) for one in self.targets]
        p, rest_p = _completed(own[0], own[1], place, tails[0])
        q, rest_q = _completed(own[1], own[0], place, tails[1])
        return Buckets(place, p, q, rest_p, rest_q)

    @cached_property
    def draws(self) -> Buckets | None:
        """Of two rows of draws: the share, or weight, of each id among the draws of its position; None of others."""
        if self.targets is None or any(one.num_draws is None for one in self.targets):
            return None
        keys = [_keys(one, self.places) for one in self.targets]
        both = np.unique(np.concatenate([key for key, _ in keys]))
        found = Buckets(both >> 32, *np.zeros((2, len(both))), *np.zeros((2, len(self.places))))
        for line, (key, mass) in zip((found.p, found.q), keys, strict=True):
            line[np.searchsorted(both, key)] = mass
            line /= np.maximum(found.sum(line), LEAST_MASS)[found.place]  # weights need not add up to 1
        return found


def _keys(targets: SparseTargets, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], Float64]:
    """(position << 32) + id of each entry at the positions, and its mass."""
    number = np.full(targets.num_tokens, -1, np.int64)
    number[places] = np.arange(len(places))
    of_entry = np.repeat(number, np.diff(targets.offsets))
    here = of_entry >= 0
    return (of_entry[here] << 32) + targets.ids[here], targets.entry_mass(np.float64)[1][here]


def _completed(own: Float64, other: Float64, place: NDArray[np.int64], tail: Float64) -> tuple[Float64, Float64]:
    """Masses of one distribution on the ids of both [E], and what is left of its tail [M].

    An id that it does not name has, of the tail, what the other gives it, but no more than the least probable id that
    it names: what is not among the first k is not more probable than they are. So two prefixes that end an entry apart
    are near, and another choice of ids is far.
    """
    named = own > 0
    least = np.full(len(tail), np.inf)
    np.minimum.at(least, place[named], own[named])
    wanted = np.where(named, 0.0, np.minimum(other, least[place]))
    asked = np.bincount(place, wanted, minlength=len(tail))
    share = np.minimum(1.0, tail / np.maximum(asked, LEAST_MASS))
    return own + wanted * share[place], np.maximum(tail - asked * share, 0.0)


def first_choices(targets: SparseTargets, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first id at each of the positions [M], all of which have entries."""
    found: NDArray[np.int64] = targets.ids[targets.offsets[places]].astype(np.int64)
    return found


def compared_places(tokens: TokensRow, rows: tuple[Row, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions at which every version of a row has a target, and those at which some have one and some have none."""
    here = tokens.has_target()
    held = np.stack([_has_target(row, here) for row in rows])
    return np.flatnonzero(here & held.all(0)), np.flatnonzero((here & ~held.all(0)) | (~here & held.any(0)))


def _has_target(row: Row, here: NDArray[np.bool_]) -> NDArray[np.bool_]:
    if isinstance(row, TargetsRow):
        return np.asarray(np.diff(row.targets.offsets) > 0)
    assert isinstance(row, ScoresRow)
    # A row of scores says something of each label, or is refused and says nothing.
    return here & bool(row.label_logprob.any() or row.entropy.any())
