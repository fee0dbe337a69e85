"""How far two rows of one store are apart: the total variation of their distributions, position by position."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from potstill.storage import Row, ScoresRow, SparseTargets, TargetsRow
from potstill.teacher_dump.selection import NO_RANK


def row_distance(a: Row, b: Row) -> tuple[float, int]:
    """Sum over the positions that have a target in either row of their total variation, and how many these are.

    Of targets: half the sum of |p - q| over the ids of both and the tail, an id that one of them lacks counting whole,
    so that no difference is hidden in a tail (draws: shares of the draws, without a tail). Of scores, which hold no
    distribution: |p - q| of the label, or the difference of the entropies in nats (1 at most) where that is larger.
    Rows of the same number and tokens only.
    """
    assert a.row == b.row, (a.row, b.row)
    if isinstance(a, TargetsRow) and isinstance(b, TargetsRow):
        return _of_targets(a.targets, b.targets)
    assert isinstance(a, ScoresRow) and isinstance(b, ScoresRow)
    here = (a.label_rank != NO_RANK) | (b.label_rank != NO_RANK)
    p, q = (np.exp(row.label_logprob[here].astype(np.float64)) for row in (a, b))
    entropies = np.abs(a.entropy[here].astype(np.float64) - b.entropy[here])
    return float(np.maximum(np.abs(p - q), np.minimum(entropies, 1.0)).sum()), int(here.sum())


def _of_targets(a: SparseTargets, b: SparseTargets) -> tuple[float, int]:
    keys = [_keys(a), _keys(b)]
    both = np.unique(np.concatenate(keys))
    difference = np.zeros(len(both))
    for sign, targets, places in zip((1.0, -1.0), (a, b), keys, strict=True):
        # Ids are distinct within a token, so no place is named twice.
        difference[np.searchsorted(both, places)] += sign * targets.entry_mass(np.float64)[1]
    total = float(np.abs(difference).sum())
    here = (np.diff(a.offsets) > 0) | (np.diff(b.offsets) > 0)
    if a.entry_column[0] == "probability":
        tails = [np.exp(targets.log_tail[here].astype(np.float64)) for targets in (a, b)]
        total += float(np.abs(tails[0] - tails[1]).sum())
    return total / 2, int(here.sum())


def _keys(targets: SparseTargets) -> NDArray[np.int64]:
    """One number for each entry: its token, then its id."""
    tokens = np.repeat(np.arange(targets.num_tokens, dtype=np.int64), np.diff(targets.offsets))
    keys: NDArray[np.int64] = (tokens << 32) + targets.ids
    return keys
