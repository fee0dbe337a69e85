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
        signed = column if reference.rank_first == "lowest" else -column
        if score.ties == "mean":
            _, group, size = np.unique(signed, return_inverse=True, return_counts=True)
            rank = (np.cumsum(size) - (size - 1) / 2)[group]
        else:
            rank = np.empty(len(column), np.float64)
            rank[np.argsort(signed, kind="stable")] = np.arange(1, len(column) + 1)
        fused += 1.0 / (score.fusion_k + rank)
    return fused


def _no_ties(columns: Sequence[Float64], score: RowScore) -> list[str]:
    """Scores that come of one figure as it stands: what matters of their ties is whether a pool is cut there."""
    return []


def _ties_in_fusion(columns: Sequence[Float64], score: RowScore) -> list[str]:
    """Each figure that ranks nothing, or whose ranks would be row ids, and what to do."""
    import numpy as np

    found = []
    for column, reference in zip(columns, score.of, strict=True):
        value, size = np.unique(column, return_counts=True)
        most, num_rows = int(size.max()), int(size.sum())
        of = f"statistic {reference.stat!r} of store {reference.store!r} is {float(value[size.argmax()]):.6g}"
        if most == num_rows > 1:
            found.append(f"{of} in all {num_rows} rows, so it ranks none; leave it out, or name another")
        elif score.ties == "row_id" and most > max(FEW_TIED, MAX_TIED_IN_FUSION * num_rows):
            found.append(
                f"{of} in {most} of {num_rows} rows ({most / num_rows:.0%}), which would be ranked by their row ids "
                f"(more than {MAX_TIED_IN_FUSION:.0%} are refused); rows.score.ties: mean gives them one rank"
            )
    return found


def _random(columns: Sequence[Float64], score: RowScore, num_rows: int, seed: int) -> Float64:
    """Numbers that only the seed decides: the control that an informed score must beat."""
    import numpy as np

    return np.random.Generator(np.random.Philox(seed)).random(num_rows)


@dataclass(frozen=True)
class RowScoreKind:
    """One way to score rows.

    num_stats: least and largest number of statistics that it takes. score(columns, options, num_rows, seed): the
    columns float64 [num_rows], one for each statistic in the order of `of`, of the rows that all stores know (every
    row where no statistic is taken) -> float64 [num_rows]. ties(columns, options): what is wrong with equal figures in
    the statistics themselves, wherever a pool is cut.
    """

    num_stats: tuple[int, int]
    score: Callable[[Sequence[Float64], RowScore, int, int], Float64]
    ties: Callable[[Sequence[Float64], RowScore], list[str]] = _no_ties


ROW_SCORES: dict[str, RowScoreKind] = {
    "stat": RowScoreKind((1, 1), _stat),
    "difference": RowScoreKind((2, 2), _difference),
    "rank_fusion": RowScoreKind((2, 16), _rank_fusion, _ties_in_fusion),
    "random": RowScoreKind((0, 0), _random),
}


# Rows of one and the same figure in a ranking, above which row ids would speak in its place; so few may be chance.
MAX_TIED_IN_FUSION = 0.25
FEW_TIED = 8


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

    ties: Literal["row_id", "mean"] = Field(
        default="row_id", description="rank_fusion: equal figures are ranked by row id, or all have their mean rank"
    )

    def describe(self) -> str:
        """In words, for a person."""
        return " ".join([self.kind, *(f"{reference.stat} of {reference.store}," for reference in self.of)]).rstrip(",")

    @model_validator(mode="after")
    def _count(self) -> RowScore:
        least, most = ROW_SCORES[self.kind].num_stats
        if not least <= len(self.of) <= most:
            raise ValueError(f"rows.score.kind {self.kind} takes {least} to {most} statistics, found {len(self.of)}")
        if self.ties != "row_id" and self.kind != "rank_fusion":
            raise ValueError(f"rows.score.ties {self.ties} is of kind rank_fusion, and the kind is {self.kind}")
        return self
