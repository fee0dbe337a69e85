"""Token selector: which positions of a row count, and how much, from the score of a policy (config/token_policies.py).

Choices are made per row, so they do not depend on the micro-batch or the world size. Columns are torch tensors over the
N positions of a micro-batch; the same code runs on the CPU before the forward pass (figures of a store) and on the
device inside it (figures of the student).

Legend: N positions, R rows; a labelled position is one that has a next token within its document.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from potstill.student_train.config.token_policies import Columns
from potstill.student_train.curriculum.step_objective import TokenChoice


def kept_count(num_labelled: int, share: float) -> int:
    """Labelled positions of one row that a share keeps: rounded up, so that a row never falls silent."""
    return math.ceil(share * num_labelled - 1e-9)


def _by_row_maximum(column: Tensor, labelled: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Column over the largest labelled value of its row, in [0, 1]."""
    column = torch.where(labelled, column, column.new_zeros(())).clamp(min=0.0)
    largest = column.new_zeros(num_rows).scatter_reduce_(0, row, column, "amax", include_self=True)
    return column / largest.clamp(min=1e-12)[row]


def _row_counts(marks: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """How many of the marks [N] bool each row has, int64 [R]; unlike bincount it asks a GPU for no size."""
    return row.new_zeros(num_rows).index_add_(0, row, marks.long())


def _row_sums(score: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Sums [R] float64 of scores [N] >= 0 by row, the same in any order of additions and beside any other rows.

    A GPU adds floats in an order of its own at each run; so each score is a whole number of 2^-40 parts of its row's
    largest, and whole numbers add up exactly.
    """
    largest = score.new_zeros(num_rows).scatter_reduce_(0, row, score, "amax", include_self=True).double()
    parts = (score.double() / largest.clamp(min=1e-300)[row] * 2.0**40).round().long()
    return row.new_zeros(num_rows).index_add_(0, row, parts).double() * (largest * 2.0**-40)


def _row_quota(score: Tensor, labelled: Tensor, row: Tensor, counts: Tensor, share: float) -> Tensor:
    """1.0 for the `kept_count` best labelled positions of each row; ties go to the earlier position."""
    score = torch.where(labelled, score.double(), score.new_full((), -math.inf).double())
    best = torch.sort(score, descending=True, stable=True).indices
    order = best[torch.sort(row[best], stable=True).indices]  # rows in order, best first within a row
    sizes = _row_counts(torch.ones_like(labelled), row, counts.shape[0])
    first = torch.cumsum(sizes, 0) - sizes
    place = torch.empty_like(row)
    place[order] = torch.arange(row.shape[0], device=row.device) - first[row[order]]
    quota = torch.ceil(share * counts.double() - 1e-9)
    return ((place < quota[row]) & labelled).float()


def choose(choice: TokenChoice, columns: Columns, *, labelled: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Weight of every position [N] float32: 0 without a label, else floor + (1 - floor) * chosen.

    labelled bool [N]; row int64 [N] in 0..num_rows-1. The sum over a row is known before the scores for kinds `share`
    (its kept count) and `weight` (its labelled count, because soft weights get row mean 1).
    """
    policy = choice.selector.entry
    if policy.by_row_maximum:
        columns = {name: _by_row_maximum(columns[name], labelled, row, num_rows) for name in policy.needs}
    score = choice.selector.score(columns)
    counts = _row_counts(labelled, row, num_rows)
    if policy.kind == "share":
        chosen = _row_quota(score, labelled, row, counts, choice.share)
    elif policy.kind == "mask":
        chosen = score * labelled
    else:
        score = torch.where(labelled, score, score.new_zeros(()))
        sums = _row_sums(score, row, num_rows)
        chosen = score * (counts / sums.clamp(min=1e-30)).to(score.dtype)[row]
    return (choice.floor + (1.0 - choice.floor) * chosen.float()) * labelled


def known_weight_sum(choice: TokenChoice, num_labelled: list[int], row_weights: list[float] | None = None) -> float:
    """Sum of the weights before the scores are known; `num_labelled` holds the labelled positions of each row.

    row_weights: what each row counts beside its positions' own weights; None: all 1.
    """
    policy = choice.selector.entry
    assert policy.kind != "mask", "a mask of the student has no known sum; the configuration refuses it"
    total = 0.0
    for row, count in enumerate(num_labelled):
        kept = kept_count(count, choice.share) if policy.kind == "share" else count
        total += (kept + choice.floor * (count - kept)) * (1.0 if row_weights is None else row_weights[row])
    return total


def known_active(choice: TokenChoice, num_labelled: list[int]) -> int | None:
    """How many positions will weigh more than 0, or None where that depends on the scores (a soft weight may be 0)."""
    if choice.floor > 0:
        return sum(num_labelled)
    if choice.selector.entry.kind == "share":
        return sum(kept_count(count, choice.share) for count in num_labelled)
    return None
