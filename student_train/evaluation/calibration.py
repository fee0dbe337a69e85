"""Calibration: does the student's largest probability say how often it is right?

Expected calibration error over equal-width bins of the top-1 probability (Guo et al., "On calibration of modern neural
networks", arXiv 1706.04599): sum over bins of share * |accuracy - confidence|.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from potstill.kernels.soft_cap import scale_and_cap_

NUM_BINS = 15
CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class TopChoices:
    """The most probable token at the positions of weight > 0: place int64 [M] among the N positions of the batch,

    confidence float32 [M] (its probability), is_label bool [M].
    """

    place: Tensor
    confidence: Tensor
    is_label: Tensor


@torch.no_grad()
def top_choices(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weights: Tensor,
    *,
    soft_cap: float | None,
    logit_scale: float,
) -> TopChoices:
    """What greedy decoding would choose, of hidden [N, D], weight [V, D], labels int64 [N], token_weights [N].

    Logits are made in chunks of at most CHUNK_BYTES of float32.
    """
    place = token_weights.nonzero()[:, 0]
    confidence, is_label = [], []
    for part in place.split(max(1, CHUNK_BYTES // (4 * weight.shape[0]))):
        raw = F.linear(hidden[part], weight, bias).float()
        logits = scale_and_cap_(raw, logit_scale=logit_scale, soft_cap=soft_cap)  # [B, V]
        largest, choice = logits.max(-1)
        confidence.append(torch.exp(largest - logits.logsumexp(-1)))
        is_label.append(choice == labels[part])
    return TopChoices(place, torch.cat(confidence), torch.cat(is_label))


@torch.no_grad()
def calibration_bins(choices: TopChoices, token_weights: Tensor) -> Tensor:
    """[3 * NUM_BINS]: weight, weighted confidence and weighted correctness per bin; token_weights [N]."""
    bins = torch.zeros(3, NUM_BINS, dtype=torch.float32, device=token_weights.device)
    bin_of = (choices.confidence * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    w = token_weights[choices.place].float()
    for row, value in enumerate((w, w * choices.confidence, w * choices.is_label.float())):
        bins[row].index_add_(0, bin_of, value)
    return bins.flatten()


def expected_calibration_error(bins: list[float]) -> float | None:
    """ECE in [0, 1] from `calibration_bins`; None when nothing was counted."""
    counts, confidence, correct = (bins[i * NUM_BINS : (i + 1) * NUM_BINS] for i in range(3))
    total = sum(counts)
    return sum(abs(a - b) for a, b in zip(correct, confidence, strict=True)) / total if total else None
