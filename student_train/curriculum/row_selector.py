"""Row selector: a number per row from the stores' indexes, and the pool of rows that a share of them makes.

Only the per-row statistics of the indexes are read here, never a target. The kinds of scores are a table of
config/row_scores.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from potstill.common.errors import UserError
from potstill.student_train.config.row_scores import ROW_SCORES, RowScore, StatRef
from potstill.student_train.config.stages import RowSelector

Float64 = NDArray[np.float64]
RowStats = Mapping[str, Mapping[str, NDArray[np.float32]]]  # store name -> statistic -> [num_rows]


def _column(reference: StatRef, stats: RowStats, key: str) -> Float64:
    store = stats[reference.store]
    if reference.stat not in store:
        raise UserError(
            f"{key}: store {reference.store!r} has no row statistic {reference.stat!r}; it has {sorted(store)}. "
            "Score again with that statistic, or name one of these"
        )
    column = np.asarray(store[reference.stat], np.float64)
    bad = np.flatnonzero(~np.isfinite(column))
    if len(bad):
        raise UserError(
            f"{key}: statistic {reference.stat!r} of store {reference.store!r} is {column[bad[0]]} at row {bad[0]} "
            f"({len(bad)} such rows); expected finite numbers; score these rows again"
        )
    return column


def _has_targets(references: Sequence[StatRef], stats: RowStats, num_rows: int) -> NDArray[np.bool_]:
    """Rows [num_rows] of which every named store says something. Where a teacher was refused, all statistics are 0."""
    known = np.ones(num_rows, bool)
    for reference in references:
        known &= np.asarray(stats[reference.store].get("num_targets", 1.0), np.float64) > 0
    return known


def row_scores(score: RowScore, stats: RowStats, *, num_rows: int, seed: int, key: str) -> Float64:
    """Score of every row [num_rows], NaN of rows without targets; `key` names the key in errors. Raises UserError."""
    columns = [_column(reference, stats, key) for reference in score.of]
    known = _has_targets(score.of, stats, num_rows)
    if not known.any():
        raise UserError(
            f"{key}: no row has targets in all of {sorted({r.store for r in score.of})}; nothing to rank by"
        )
    scores = np.full(num_rows, np.nan)
    kept = [column[known] for column in columns]
    scores[known] = ROW_SCORES[score.kind].score(kept, score, int(known.sum()), seed)
    return scores


def ranked_rows(scores: Float64, keep: str) -> NDArray[np.int64]:
    """Row ids from the wanted end on, rows without a score (NaN) last; ties by row id, so that all ranks agree."""
    return np.argsort(scores if keep == "lowest" else -scores, kind="stable").astype(np.int64)


def pool(ranked: NDArray[np.int64], *, share: float, skip: float) -> NDArray[np.int64] | None:
    """Row ids (ascending) of the window [skip, skip + share) of the ranking; None when that is every row."""
    num_rows = len(ranked)
    first = min(round(skip * num_rows), num_rows)
    last = min(first + max(round(share * num_rows), 1), num_rows)
    return None if (first, last) == (0, num_rows) else np.sort(ranked[first:last])


def needed_stats(selector: RowSelector | None) -> frozenset[str]:
    """Names of the stores whose index a selector reads."""
    return frozenset(reference.store for reference in selector.score.of) if selector else frozenset()
