"""Row selector: a number per row from the stores' indexes, and the pool of rows that a share of them makes.

Only the per-row statistics of the indexes are read here, never a target. A new kind is one function and one entry
in ROW_SCORES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from potstill.common.errors import UserError
from potstill.student_train.config.train import RowScore, RowSelector, StatRef

Float64 = NDArray[np.float64]
RowStats = Mapping[str, Mapping[str, NDArray[np.float32]]]  # store name -> statistic -> [num_rows]


def _stat(columns: Sequence[Float64], score: RowScore) -> Float64:
    """One statistic as it stands (SALT_DS, arXiv 2410.18779: salt_median_zero or salt_median_drop of the small LM)."""
    return columns[0]


def _difference(columns: Sequence[Float64], score: RowScore) -> Float64:
    """First minus second (MiniPLM, arXiv 2410.17215: loss of the reference minus loss of the teacher)."""
    return columns[0] - columns[1]


def _rank_fusion(columns: Sequence[Float64], score: RowScore) -> Float64:
    """Reciprocal rank fusion, sum of 1 / (k + rank) with rank 1 at each statistic's own end (POCL, 2506.05695)."""
    fused = np.zeros_like(columns[0])
    for column, reference in zip(columns, score.of, strict=True):
        ordered = np.argsort(column if reference.rank_first == "lowest" else -column, kind="stable")
        rank = np.empty(len(column), np.float64)
        rank[ordered] = np.arange(1, len(column) + 1)
        fused += 1.0 / (score.fusion_k + rank)
    return fused


ROW_SCORES: dict[str, Callable[[Sequence[Float64], RowScore], Float64]] = {
    "stat": _stat,
    "difference": _difference,
    "rank_fusion": _rank_fusion,
}


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
    if score.kind == "random":
        return np.random.Generator(np.random.Philox(seed)).random(num_rows)
    columns = [_column(reference, stats, key) for reference in score.of]
    known = _has_targets(score.of, stats, num_rows)
    if not known.any():
        raise UserError(
            f"{key}: no row has targets in all of {sorted({r.store for r in score.of})}; nothing to rank by"
        )
    scores = np.full(num_rows, np.nan)
    scores[known] = ROW_SCORES[score.kind]([column[known] for column in columns], score)
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
