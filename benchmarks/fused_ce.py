"""The label loss of others, from hidden states and a head: Liger's fused linear cross-entropy, and torch's own.

Each takes hidden [N, D], weight [V, D] of one floating dtype and labels int64 [N] (-100: none), and gives the sum of
the cross-entropy in nats over the labelled tokens (0-d), differentiable in both. None of them distils.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.kernels.types import IGNORE_LABEL

CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rival:
    """A label loss under the name that results carry, and what it does in one line."""

    name: str
    method: str
    loss: CrossEntropy


def liger(*, wide: bool) -> Rival | None:
    """Liger's, whose weight gradient is summed in the head's dtype, or in float32 (`wide`); None if not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        options: dict[str, Any] = {"accum_dtype": torch.float32} if wide else {}
        found: Tensor = liger_fused_linear_cross_entropy(
            hidden, weight, labels, ignore_index=IGNORE_LABEL, reduction="sum", **options
        )
        return found

    summed = "float32" if wide else "the head's dtype"
    return Rival("liger_ce_fp32" if wide else "liger_ce", f"Liger's fused linear CE, dW summed in {summed}", loss)


def torch_fused() -> Rival | None:
    """torch's own chunked linear cross-entropy with its defaults (torch 2.13 and later), None in an older torch."""
    linear_cross_entropy = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if linear_cross_entropy is None or options is None:
        return None

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = linear_cross_entropy(
            hidden, weight, labels, reduction="sum", ignore_index=IGNORE_LABEL, options=options()
        )
        return found

    return Rival("torch_ce", "torch's own linear_cross_entropy, chunked", loss)


def torch_plain() -> Rival:
    """All logits at once and in float32, as the models of transformers compute it."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_LABEL, reduction="sum")

    return Rival("torch_plain_ce", "torch's cross_entropy of all logits in float32", loss)


def torch_best() -> Rival:
    """torch's own fused one where this torch has it, else the plain one; the name says which."""
    return torch_fused() or torch_plain()
