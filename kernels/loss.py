"""The distillation loss: sparse teacher targets against logits, or against hidden states and a head.

    loss = 1 / normalizer * sum_n w_n [ alpha T^2 kd_n KD_n + ce_n CE_n + z_loss lse_n^2 ]

T is the student's temperature: 1 where the teacher alone is tempered. ce_n is ce_weight; with off_kd "ce" it is
ce_weight + alpha for a token whose KD is off (kd_n = 0, or no target).
This is the room's door for losses. Formulas: row_terms.py and divergences.py; tour: docs/kernels.md.

Every function takes the same options: the fields of LossSettings, one by one or as `settings` whole, and those of
CallOptions. Without either: KL(teacher || student) on the k + 1 buckets, on all tokens alike.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from potstill.kernels import self_check as checking
from potstill.kernels.checks import check_logits
from potstill.kernels.divergences import DIVERGENCES
from potstill.kernels.fused_linear import linear_loss, logits_loss
from potstill.kernels.loss_call import CallOptions, LinearInputs, LossCall, logits_chunk_bytes, read_options
from potstill.kernels.settings import LossSettings, check_combination
from potstill.kernels.statistics import TokenStatistics, run_statistics
from potstill.kernels.types import (
    IGNORE_LABEL,
    MISSING_MASS_MODES,
    KernelInputError,
    LossSums,
    SelfCheckError,
    SparseTargetArrays,
    SparseTargetTensors,
)

__all__ = [
    "DIVERGENCES",
    "IGNORE_LABEL",
    "MISSING_MASS_MODES",
    "CallOptions",
    "KernelInputError",
    "LossSettings",
    "LossSums",
    "SelfCheckError",
    "SparseTargetArrays",
    "SparseTargetTensors",
    "TokenStatistics",
    "check_combination",
    "linear_sparse_loss",
    "logits_chunk_bytes",
    "self_check",
    "sparse_loss",
    "token_statistics",
]


# A compiled backbone meets the loss at a graph break: it is one opaque, already fused step.
@torch.compiler.disable
def linear_sparse_loss(
    *,
    hidden: Tensor,
    weight: Tensor,
    targets: SparseTargetTensors | None,
    labels: Tensor,
    bias: Tensor | None = None,
    settings: LossSettings | None = None,
    **options: Any,
) -> tuple[Tensor, LossSums]:
    """The loss (0-d, float32; float64 for float64 inputs) and its parts, from hidden states and a head.

    hidden [N, D], weight [V, D], bias [V]: one floating dtype (under autocast they are cast to its dtype).
    targets: of N tokens, ids < V; None with alpha 0. labels: int64 [N], -100 none.
    settings, options: see LossSettings and CallOptions.

    Differentiable once in hidden, weight and bias. The gradient is computed in the forward, chunk by chunk;
    the full [N, V] never exists. Raises KernelInputError (a ValueError) that names the argument, TypeError for an
    option that there is not.
    """
    inputs = LinearInputs.check(hidden, weight, bias)
    settings, given = read_options(settings, options)
    call = LossCall.make(settings, given, targets=targets, labels=labels, sizes=inputs.sizes, like=inputs.hidden)
    return linear_loss(inputs, call)


@torch.compiler.disable
def sparse_loss(
    *,
    logits: Tensor,
    targets: SparseTargetTensors | None,
    labels: Tensor,
    inplace: bool = False,
    settings: LossSettings | None = None,
    **options: Any,
) -> tuple[Tensor, LossSums]:
    """linear_sparse_loss from given raw logits [N, V].

    inplace: the gradient overwrites `logits`, whose values are lost to the caller; saves N V elements.
    """
    check_logits(logits)
    settings, given = read_options(settings, options)
    sizes = (logits.shape[0], logits.shape[1])
    call = LossCall.make(settings, given, targets=targets, labels=labels, sizes=sizes, like=logits, lists_rows=False)
    return logits_loss(logits, call, inplace=inplace)


@torch.compiler.disable
def self_check(
    *,
    hidden: Tensor,
    weight: Tensor,
    targets: SparseTargetTensors | None,
    labels: Tensor,
    bias: Tensor | None = None,
    settings: LossSettings | None = None,
    **options: Any,
) -> dict[str, float]:
    """Compares the path that linear_sparse_loss takes for these arguments with float64, on 16 tokens.

    Returns the relative errors of the loss and of each gradient; raises SelfCheckError with them when one
    is above the tolerance of the dtype, and KernelInputError when the targets hold nonsense. The reference
    is computed on the CPU with the head a block at a time. Gradients of the model are not touched.
    """
    inputs = LinearInputs.check(hidden, weight, bias)
    settings, given = read_options(settings, options)
    return checking.compare(inputs, settings, given, targets=targets, labels=labels)


@torch.compiler.disable
def token_statistics(
    *,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    targets: SparseTargetTensors | None = None,
    bias: Tensor | None = None,
    settings: LossSettings | None = None,
    **options: Any,
) -> TokenStatistics:
    """Label log-probability, entropy and divergence of every token, chunked and without gradients.

    Of the settings those that shape the divergence and the logits count, whatever the weights of the terms; without
    targets the divergence is 0. Weights of tokens are refused: every token is measured.
    """
    inputs = LinearInputs.check(hidden, weight, bias)
    settings, given = read_options(settings, options)
    for name in ("token_weights", "kd_weights", "normalizer"):
        if getattr(given, name) is not None:
            raise KernelInputError(f"{name} is given, but statistics are taken of every token alike")
    settings = (
        settings.without_kd() if targets is None else replace(settings, alpha=1.0, ce_weight=0.0, off_kd="nothing")
    )
    call = LossCall.make(settings, given, targets=targets, labels=labels, sizes=inputs.sizes, like=inputs.hidden)
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        return run_statistics(inputs, call)
