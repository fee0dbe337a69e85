"""Row scores: how per-row statistics of stores become one number per row. A new kind is a function and an entry.

The configuration reads this table, so nothing heavy is imported with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from potstill.common.config import StrictModel
from potstill.common.named_entries import NameIn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Float64 = NDArray[np.float64]


def _stat(columns: Sequence[Float64], score: RowScore, num_rows: int, seed: int) -> Float64:
    """One statistic as it stands (SALT_DS, arXiv 2410.18779: salt_median_zero or salt_median_drop of the small LM)."""
    return columns[0]


def _difference(columns: Sequence[Float64], score: RowScore, num_rows: int, seed: int) -> Float64:
    """First minus second (MiniPLM, arXiv 2410.17215: loss of the reference minus loss of the teacher)."""
    return columns[0] - columns[1]


def _rank_fusion(columns: Sequence[Float64], score: RowScore, num_rows: int, seed: int) -> Float64:
    """Reciprocal rank fusion, sum of 1 / (k + rank) with rank 1 at each statistic's own end (POCL, 2506.05695)."""
    import numpy as np

    fused = np.zeros_like(columns[0])
    for column, reference in zip(columns, score.of, strict=True):
        ordered = np.argsort(column if reference.rank_first == "lowest" else -column, kind="stable")
        rank = np.empty(len(column), np.float64)
        rank[ordered] = np.arange(1, len(column) + 1)
        fused += 1.0 / (score.fusion_k + rank)
    return fused


def _random(columns: Sequence[Float64], score: RowScore, num_rows: int, seed: int) -> Float64:
    """Numbers that only the seed decides: the control that an informed score must beat."""
    import numpy as np

    return np.random.Generator(np.random.Philox(seed)).random(num_rows)


@dataclass(frozen=True)
class RowScoreKind:
    """One way to score rows.

    num_stats: least and largest number of statistics that it takes. score(columns, options, num_rows, seed): the
    columns float64 [num_rows], one for each statistic in the order of `of`, of the rows that all stores know (every
    row where no statistic is taken) -> float64 [num_rows].
    """

    num_stats: tuple[int, int]
    score: Callable[[Sequence[Float64], RowScore, int, int], Float64]


ROW_SCORES: dict[str, RowScoreKind] = {
    "stat": RowScoreKind((1, 1), _stat),
    "difference": RowScoreKind((2, 2), _difference),
    "rank_fusion": RowScoreKind((2, 16), _rank_fusion),
    "random": RowScoreKind((0, 0), _random),
}


class StatRef(StrictModel):
    """One per-row statistic of a scores or targets store."""

    store: str = Field(description="Name in data.scores or data.targets")
    stat: str = Field(default="mean_loss", description="Name of the statistic in the store's index")
    rank_first: Literal["lowest", "highest"] = Field(default="lowest", description="rank_fusion: which end has rank 1")


class RowScore(StrictModel):
    """A number per row, made of one or more statistics."""

    kind: Annotated[str, NameIn(ROW_SCORES)] = Field(default="stat", description="How `of` becomes a score")
    of: tuple[StatRef, ...] = Field(
        default=(), description="stat: one; difference: first minus second; rank_fusion: two or more"
    )
    fusion_k: float = Field(default=60.0, gt=0, description="rank_fusion: sum of 1 / (fusion_k + rank)")

    @model_validator(mode="after")
    def _count(self) -> RowScore:
        least, most = ROW_SCORES[self.kind].num_stats
        if not least <= len(self.of) <= most:
            raise ValueError(f"rows.score.kind {self.kind} takes {least} to {most} statistics, found {len(self.of)}")
        return self
