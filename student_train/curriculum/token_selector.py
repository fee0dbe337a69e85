"""Token selector: which positions of a row count, and how much.

A policy is one function from columns to a score, and one entry in TOKEN_POLICIES. Choices are made per row, so they do
not depend on the micro-batch or the world size. Columns are torch tensors over the N positions of a micro-batch; the
same code runs on the CPU before the forward pass (figures of a store) and on the device inside it (figures of the
student).

Legend: N positions, R rows; a labelled position is one that has a next token within its document.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from potstill.student_train.config.train import TokenSelector
from potstill.student_train.curriculum.step_objective import TokenChoice

Columns = Mapping[str, Tensor]  # each [N]: loss, rank, entropy, reference_loss, divergence, key


def _label_rank(columns: Columns, options: TokenSelector) -> Tensor:
    """1 where the small model has the true token among its first `max_rank` (SALT's learnable tokens, 2410.18779)."""
    return (columns["rank"] < options.max_rank).float()


def _top_loss(columns: Columns, options: TokenSelector) -> Tensor:
    """The loss itself: hard positions first."""
    return columns["loss"]


def _top_entropy(columns: Columns, options: TokenSelector) -> Tensor:
    """The entropy itself (SE-KD, 2602.01395, with the student as source)."""
    return columns["entropy"]


def _excess_loss(columns: Columns, options: TokenSelector) -> Tensor:
    """Loss minus the reference's loss: still to learn, and learnable (Rho-1, 2404.07965)."""
    return columns["loss"] - columns["reference_loss"]


def _entropy_band(columns: Columns, options: TokenSelector) -> Tensor:
    """1 where low <= entropy <= high."""
    low = -math.inf if options.low is None else options.low
    high = math.inf if options.high is None else options.high
    return ((columns["entropy"] >= low) & (columns["entropy"] <= high)).float()


def _paced(columns: Columns, options: TokenSelector) -> Tensor:
    """p^a (1-p)^b of the true token's probability p (PACED, 2603.11178, with p in the place of the pass rate)."""
    p = torch.exp(-columns["loss"]).clamp(0.0, 1.0)
    return p**options.power_a * (1.0 - p) ** options.power_b


def _soft_or(columns: Columns, options: TokenSelector) -> Tensor:
    """1 - (1 - h)(1 - d) of student entropy h and divergence d, each over its row's largest (TIP, 2604.14084)."""
    entropy, divergence = columns["entropy_of_row"], columns["divergence_of_row"]
    return 1.0 - (1.0 - entropy) * (1.0 - divergence)


def _random(columns: Columns, options: TokenSelector) -> Tensor:
    """A keyed hash of the position: the control that an informed policy must beat."""
    return columns["key"]


@dataclass(frozen=True)
class TokenPolicy:
    """`share`: the best-scored share of each row counts 1. `mask`: score 1 counts 1. `weight`: soft, row mean 1."""

    kind: Literal["share", "mask", "weight"]
    needs: tuple[str, ...]
    score: Callable[[Columns, TokenSelector], Tensor]


TOKEN_POLICIES: dict[str, TokenPolicy] = {
    "label_rank": TokenPolicy("mask", ("rank",), _label_rank),
    "top_loss": TokenPolicy("share", ("loss",), _top_loss),
    "top_entropy": TokenPolicy("share", ("entropy",), _top_entropy),
    "excess_loss": TokenPolicy("share", ("loss", "reference_loss"), _excess_loss),
    "entropy_band": TokenPolicy("mask", ("entropy",), _entropy_band),
    "skip_low_entropy": TokenPolicy("share", ("entropy",), _top_entropy),
    "paced": TokenPolicy("weight", ("loss",), _paced),
    "soft_or": TokenPolicy("share", ("entropy", "divergence"), _soft_or),
    "random": TokenPolicy("share", ("key",), _random),
}


def kept_count(num_labelled: int, share: float) -> int:
    """Labelled positions of one row that a share keeps: rounded up, so that a row never falls silent."""
    return math.ceil(share * num_labelled - 1e-9)


def _by_row_maximum(column: Tensor, labelled: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Column over the largest labelled value of its row, in [0, 1]."""
    column = torch.where(labelled, column, column.new_zeros(())).clamp(min=0.0)
    largest = column.new_zeros(num_rows).scatter_reduce_(0, row, column, "amax", include_self=True)
    return column / largest.clamp(min=1e-12)[row]


def _row_quota(score: Tensor, labelled: Tensor, row: Tensor, counts: Tensor, share: float) -> Tensor:
    """1.0 for the `kept_count` best labelled positions of each row; ties go to the earlier position."""
    score = torch.where(labelled, score.double(), score.new_full((), -math.inf).double())
    best = torch.sort(score, descending=True, stable=True).indices
    order = best[torch.sort(row[best], stable=True).indices]  # rows in order, best first within a row
    sizes = torch.bincount(row, minlength=counts.shape[0])
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
    policy = TOKEN_POLICIES[choice.selector.policy]
    if policy.score is _soft_or:
        columns = {
            **columns,
            "entropy_of_row": _by_row_maximum(columns["entropy"], labelled, row, num_rows),
            "divergence_of_row": _by_row_maximum(columns["divergence"], labelled, row, num_rows),
        }
    score = policy.score(columns, choice.selector)
    counts = torch.bincount(row[labelled], minlength=num_rows)
    if policy.kind == "share":
        chosen = _row_quota(score, labelled, row, counts, choice.share)
    elif policy.kind == "mask":
        chosen = score * labelled
    else:
        score = torch.where(labelled, score, score.new_zeros(()))
        sums = score.new_zeros(num_rows).index_add_(0, row, score)
        chosen = score * (counts / sums.clamp(min=1e-30)).to(score.dtype)[row]
    return (choice.floor + (1.0 - choice.floor) * chosen.float()) * labelled


def known_weight_sum(choice: TokenChoice, num_labelled: list[int]) -> float:
    """Sum of the weights before the scores are known; `num_labelled` holds the labelled positions of each row."""
    policy = TOKEN_POLICIES[choice.selector.policy]
    assert policy.kind != "mask", "a mask of the student has no known sum; the configuration refuses it"
    total = 0.0
    for count in num_labelled:
        kept = kept_count(count, choice.share) if policy.kind == "share" else count
        total += kept + choice.floor * (count - kept)
    return total


def known_active(choice: TokenChoice, num_labelled: list[int]) -> int | None:
    """How many positions will weigh more than 0, or None where that depends on the scores (a soft weight may be 0)."""
    if choice.floor > 0:
        return sum(num_labelled)
    if TOKEN_POLICIES[choice.selector.policy].kind == "share":
        return sum(kept_count(count, choice.share) for count in num_labelled)
    return None
