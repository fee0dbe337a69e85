"""The pools of rows that a stage draws from, worked out by one process of a node where the stores say so.

Over 24 million rows a ranking takes seconds and most of a gigabyte; it is a pure function of the stores' indexes and of
the settings, so the ranks of a node share what one of them has found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.storage import Add, NodeFolder, shared_arrays, shared_from
from potstill.student_train.config.stages import RowSelector
from potstill.student_train.curriculum.row_selector import (
    RowStats,
    needed_stats,
    pool,
    ranked_rows,
    row_scores,
    ties_at_cut,
    window,
)

Pool = NDArray[np.integer] | None  # row ids in the source, ascending; None: all of them
POOLS_VERSION = 1  # of what lies in shared files: a change of any pool needs a new number


@dataclass(frozen=True)
class PlanSource:
    """A source of rows as the plan sees it: how many there are, and the figures that row selectors need.

    node: where the processes of the node share what they work out of stores whose indexes have these digests.
    """

    name: str
    num_rows: int
    stats: RowStats
    node: NodeFolder | None = None
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SourcePools:
    """Of each part of a stage: the pool of one source, and what is wrong with ties there."""

    pools: tuple[Pool, ...]
    ties: tuple[tuple[str, ...], ...]


def source_pools(
    selector: RowSelector, source: PlanSource, windows: Sequence[tuple[float, float]], *, seed: int, key: str
) -> SourcePools:
    """The pools of these (share, skip); `key` names the selector in errors and in what is told. Raises UserError."""
    stores = sorted(needed_stats(selector))
    is_pinned = set(stores) <= set(source.digests)
    node = shared_from(source.node, source.num_rows * 8) if is_pinned else None
    what = {
        "what": "row_pools",
        "version": POOLS_VERSION,
        "indexes": {name: source.digests[name] for name in stores} if is_pinned else {},
        "selector": [selector.score.model_dump(mode="json"), selector.keep],
        "windows": [list(pair) for pair in windows],
        "rows": source.num_rows,
        "seed": seed,
        "key": key,
    }
    found = shared_arrays(node, what, partial(_build, selector, source, windows, seed, key))
    places = [window(source.num_rows, share=share, skip=skip) for share, skip in windows]
    return SourcePools(
        tuple(found.arrays.get(_name(place)) for place in places),
        tuple(tuple(texts) for texts in found.note["ties"]),
    )


def _build(
    selector: RowSelector,
    source: PlanSource,
    windows: Sequence[tuple[float, float]],
    seed: int,
    key: str,
    add: Add,
) -> Mapping[str, Any]:
    scores, told = row_scores(selector.score, source.stats, num_rows=source.num_rows, seed=seed, key=key)
    ranked = ranked_rows(scores, selector.keep)
    # Half the memory, and half the pages that a rank touches, where ids fit.
    dtype = np.int32 if source.num_rows < 1 << 31 else np.int64
    ties: list[list[str]] = []
    added: set[str] = set()
    for share, skip in windows:
        at_cut = ties_at_cut(scores, ranked, selector.score, share=share, skip=skip, key=key)
        ties.append([*told, *([] if at_cut is None else [at_cut])])
        name = _name(window(source.num_rows, share=share, skip=skip))
        rows = None if name in added else pool(ranked, share=share, skip=skip)
        added.add(name)
        if rows is not None:
            add(name, rows.astype(dtype))
    return {"ties": ties}


def _name(place: tuple[int, int]) -> str:
    return f"{place[0]}-{place[1]}"
