"""Calibration: does the student's largest probability say how often it is right?

Expected calibration error over equal-width bins of the top-1 probability (Guo et al., "On calibration of modern neural
networks", arXiv 1706.04599): sum over bins of share * |accuracy - confidence|.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from potstill.kernels.soft_cap import scale_and_cap_

NUM_BINS = 15
CHUNK_BYTES = 64 << 20


@torch.no_grad()
def calibration_bins(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weights: Tensor,
    *,
    soft_cap: float | None,
    logit_scale: float,
) -> Tensor:
    """[3 * NUM_BINS]: weight, weighted confidence and weighted correctness per bin, over positions of weight > 0.

    hidden [N, D], weight [V, D], labels int64 [N]; logits are made in chunks of at most CHUNK_BYTES of float32.
    """
    bins = torch.zeros(3, NUM_BINS, dtype=torch.float32, device=hidden.device)
    rows = token_weights.nonzero()[:, 0]
    for part in rows.split(max(1, CHUNK_BYTES // (4 * weight.shape[0]))):
        raw = F.linear(hidden[part], weight, bias).float()
        logits = scale_and_cap_(raw, logit_scale=logit_scale, soft_cap=soft_cap)  # [B, V]
        largest, choice = logits.max(-1)
        confidence = torch.exp(largest - logits.logsumexp(-1))
        place = (confidence * NUM_BINS).long().clamp(max=NUM_BINS - 1)
        w = token_weights[part].float()
        correct = (choice == labels[part]).float()
        for row, value in enumerate((w, w * confidence, w * correct)):
            bins[row].index_add_(0, place, value)
    return bins.flatten()


def expected_calibration_error(bins: list[float]) -> float | None:
    """ECE in [0, 1] from `calibration_bins`; None when nothing was counted."""
    counts, confidence, correct = (bins[i * NUM_BINS : (i + 1) * NUM_BINS] for i in range(3))
    total = sum(counts)
    return sum(abs(a - b) for a, b in zip(correct, confidence, strict=True)) / total if total else None
