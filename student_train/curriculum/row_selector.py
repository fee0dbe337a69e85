"""Row selector: a number per row from the stores' indexes, and the pool of rows that a share of them makes.

Only the per-row statistics of the indexes are read here, never a target. The kinds of scores are a table of
config/row_scores.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from potstill.common.errors import UserError
from potstill.storage import HELD
from potstill.student_train.config.row_scores import FEW_TIED, ROW_SCORES, RowScore, StatRef
from potstill.student_train.config.stages import RowSelector

Float64 = NDArray[np.float64]
# Share of the scored rows that may have the score at which a pool is cut.
MAX_TIED = 0.1
RowStats = Mapping[str, Mapping[str, NDArray[np.float32]]]  # store name -> statistic -> [num_rows]


def _column(reference: StatRef, stats: RowStats, key: str) -> Float64:
    store = stats[reference.store]
    if reference.stat not in store:
        raise UserError(
            f"{key}: store {reference.store!r} has no row statistic {reference.stat!r}; it has {sorted(store)}. "
            "Score again with that statistic, or name one of these"
        )
    if HELD in store and not np.asarray(store[HELD]).all():
        raise UserError(
            f"{key}: store {reference.store!r} holds targets of some rows only (potstill dump --only-rows-of), so it "
            "cannot rank all of them; rank by a store of all rows"
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
        known &= np.asarray(stats[reference.store].get("num_targets", 1.0)) > 0
    return known


def row_scores(
    score: RowScore, stats: RowStats, *, num_rows: int, seed: int, key: str
) -> tuple[Float64, tuple[str, ...]]:
    """Score of every row [num_rows], NaN of rows without targets, and what is wrong with ties in its statistics.

    `key` names the key in errors and in what is told. Raises UserError.
    """
    columns = [_column(reference, stats, key) for reference in score.of]
    known = _has_targets(score.of, stats, num_rows)
    if not known.any():
        raise UserError(
            f"{key}: no row has targets in all of {sorted({r.store for r in score.of})}; nothing to rank by"
        )
    kind = ROW_SCORES[score.kind]
    if not known.all():  # of millions of rows each copy of a column is felt
        columns = [column[known] for column in columns]
    ties = tuple(f"{key}: {what}" for what in kind.ties(columns, score))
    found = kind.score(columns, score, int(known.sum()), seed)
    if len(found) == num_rows:
        return found, ties
    scores = np.full(num_rows, np.nan)
    scores[known] = found
    return scores, ties


def ranked_rows(scores: Float64, keep: str) -> NDArray[np.int64]:
    """Row ids from the wanted end on, rows without a score (NaN) last; ties by row id, so that all ranks agree."""
    return np.argsort(scores if keep == "lowest" else -scores, kind="stable").astype(np.int64, copy=False)


def window(num_rows: int, *, share: float, skip: float) -> tuple[int, int]:
    """(first, last) place of the ranking that is in the pool, and the first behind it."""
    first = min(round(skip * num_rows), num_rows)
    return first, min(first + max(round(share * num_rows), 1), num_rows)


def pool(ranked: NDArray[np.int64], *, share: float, skip: float) -> NDArray[np.int64] | None:
    """Row ids (ascending) of the window [skip, skip + share) of the ranking; None when that is every row."""
    num_rows = len(ranked)
    first, last = window(num_rows, share=share, skip=skip)
    return None if (first, last) == (0, num_rows) else np.sort(ranked[first:last])


def ties_at_cut(
    scores: Float64, ranked: NDArray[np.int64], score: RowScore, *, share: float, skip: float, key: str
) -> str | None:
    """What is wrong with a cut among rows that the score cannot tell apart: their row ids choose. None: nothing.

    A few ties at the cut are fine: at most MAX_TIED of the rows that have a score, or FEW_TIED rows.
    """
    num_scored = int(np.isfinite(scores).sum())
    for cut in window(len(ranked), share=share, skip=skip):
        if not 0 < cut < num_scored or scores[ranked[cut - 1]] != scores[ranked[cut]]:
            continue
        value = float(scores[ranked[cut]])
        tied = int((scores == value).sum())
        if tied > max(FEW_TIED, MAX_TIED * num_scored):
            return (
                f"{key}.score: {tied} of {num_scored} rows ({tied / num_scored:.0%}) have the score {value:.6g}, and "
                f"the pool (share {share:g}, skip {skip:g}) is cut among them: row ids would choose, not the score "
                f"({score.describe()}); at most {MAX_TIED:.0%} may tie. {_way_out(score)}"
            )
    return None


def _way_out(score: RowScore) -> str:
    if any(reference.stat == "salt_median_zero" for reference in score.of):
        return (
            "salt_median_zero is 0 wherever fewer than half of the labels are within salt_rank: take salt_median_drop, "
            "or score again with a larger salt_rank or a better scorer"
        )
    return "Take a finer statistic, rank_fusion with a second one, or a share that does not cut there"


def needed_stats(selector: RowSelector | None) -> frozenset[str]:
    """Names of the stores whose index a selector reads."""
    return frozenset(reference.store for reference in selector.score.of) if selector else frozenset()
