"""The distillation loss: sparse teacher targets against logits, or against hidden states and a head.

    loss = 1 / normalizer * sum_n w_n [ alpha T^2 kd_n KD_n + ce_weight CE_n + z_loss lse_n^2 ]

T is the student's temperature: 1 where the teacher alone is tempered.
This is the room's door for losses. Formulas: objective.py and divergences.py; tour: docs/kernels.md.
"""

from typing import Any, Unpack

import torch
from torch import Tensor

from potstill.kernels import self_check as checking
from potstill.kernels.arguments import (
    LossOptions,
    check_linear,
    check_logits,
    logits_chunk_bytes,
    make_plan,
    under_autocast,
    with_defaults,
)
from potstill.kernels.divergences import DIVERGENCES
from potstill.kernels.fused_linear import FusedLinearLoss, FusedLoss, LinearTokenLosses
from potstill.kernels.settings import check_combination
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
    "KernelInputError",
    "LossOptions",
    "LossSums",
    "SelfCheckError",
    "SparseTargetArrays",
    "SparseTargetTensors",
    "TokenStatistics",
    "check_combination",
    "linear_sparse_loss",
    "linear_sparse_losses",
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
    **options: Unpack[LossOptions],
) -> tuple[Tensor, LossSums]:
    """The loss (0-d, float32; float64 for float64 inputs) and its parts, from hidden states and a head.

    hidden [N, D], weight [V, D], bias [V]: one floating dtype (under autocast they are cast to its dtype).
    targets: of N tokens, ids < V; None with alpha 0. labels: int64 [N], -100 none.
    options: see LossOptions.

    Differentiable once in hidden, weight and bias. The gradient is computed in the forward, chunk by chunk;
    the full [N, V] never exists. Raises KernelInputError (a ValueError) that names the argument.
    """
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    check_linear(hidden, weight, bias)
    plan = make_plan(
        with_defaults(options),
        targets=targets,
        labels=labels,
        num_tokens=hidden.shape[0],
        vocab_size=weight.shape[0],
        like=hidden,
    )
    record = torch.is_grad_enabled()
    needs = tuple(record and value is not None and value.requires_grad for value in (hidden, weight, bias))
    with torch.autocast(hidden.device.type, enabled=False):
        loss, sums = FusedLinearLoss.apply(hidden, weight, bias, plan, needs)
    return loss, LossSums.unstack(sums)


@torch.compiler.disable
def linear_sparse_losses(
    *,
    hidden: Tensor,
    weight: Tensor,
    targets: SparseTargetTensors | None,
    labels: Tensor,
    bias: Tensor | None = None,
    **options: Unpack[LossOptions],
) -> Tensor:
    """The summands of linear_sparse_loss, one per token [N]; `normalizer` plays no part and is refused.

    Any upstream gradient per token is right here, because backward recomputes the logits; that is a
    fourth product, so take linear_sparse_loss when a weighted sum is all you want.
    """
    if options.get("normalizer") is not None:
        raise KernelInputError("normalizer is given, but losses per token are not divided by anything")
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    check_linear(hidden, weight, bias)
    plan = make_plan(
        with_defaults(options),
        targets=targets,
        labels=labels,
        num_tokens=hidden.shape[0],
        vocab_size=weight.shape[0],
        like=hidden,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        losses: Tensor = LinearTokenLosses.apply(hidden, weight, bias, plan)
    return losses


@torch.compiler.disable
def sparse_loss(
    *,
    logits: Tensor,
    targets: SparseTargetTensors | None,
    labels: Tensor,
    inplace: bool = False,
    **options: Unpack[LossOptions],
) -> tuple[Tensor, LossSums]:
    """linear_sparse_loss from given raw logits [N, V].

    inplace: the gradient overwrites `logits`, whose values are lost to the caller; saves N V elements.
    """
    check_logits(logits)
    plan = make_plan(
        with_defaults(options),
        targets=targets,
        labels=labels,
        num_tokens=logits.shape[0],
        vocab_size=logits.shape[1],
        like=logits,
    )
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    loss, sums = FusedLoss.apply(logits, plan, needs_grad, inplace)
    return loss, LossSums.unstack(sums)


@torch.compiler.disable
def self_check(
    *,
    hidden: Tensor,
    weight: Tensor,
    targets: SparseTargetTensors | None,
    labels: Tensor,
    bias: Tensor | None = None,
    **options: Unpack[LossOptions],
) -> dict[str, float]:
    """Compares the path that linear_sparse_loss takes for these arguments with float64, on 16 tokens.

    Returns the relative errors of the loss and of each gradient; raises SelfCheckError with them when one
    is above the tolerance of the dtype, and KernelInputError when the targets hold nonsense. The reference
    is computed on the CPU with the head a block at a time. Gradients of the model are not touched.
    """
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    check_linear(hidden, weight, bias)
    checking.check_values(targets, weight.shape[0])
    arguments: dict[str, Any] = dict(options)
    arguments |= {"hidden": hidden, "weight": weight, "bias": bias, "targets": targets, "labels": labels}
    rows = checking.pick_rows(options.get("token_weights"), hidden.shape[0], hidden.device)
    if rows.shape[0] == 0:
        return {}
    call = checking.subset(arguments, rows)
    leaves = [name for name in ("hidden", "weight", "bias") if call[name] is not None]
    # Autocast would round the reference's float64 too.
    with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
        for name in leaves:
            call[name] = call[name].detach().requires_grad_()
        loss, _ = linear_sparse_loss(**call)
        grads = torch.autograd.grad(loss, [call[name] for name in leaves])
        values = {f"{name} gradient": grad for name, grad in zip(leaves, grads, strict=True)}
        logits = checking.wide_logits(call)
        truth, _ = sparse_loss(logits=logits, **checking.on_cpu(call))
        (slope,) = torch.autograd.grad(truth, logits)
    with torch.no_grad():
        figures = checking.relative_errors(call, values | {"loss": loss}, truth, slope)
    checking.judge(figures, hidden.dtype)
    return figures


@torch.compiler.disable
def token_statistics(
    *,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    targets: SparseTargetTensors | None = None,
    bias: Tensor | None = None,
    **options: Unpack[LossOptions],
) -> TokenStatistics:
    """Label log-probability, entropy and divergence of every token, chunked and without gradients.

    Of the options those that shape the divergence and the logits count; without targets the divergence
    is 0. Weights are refused: every token is measured.
    """
    for name in ("token_weights", "kd_weights", "normalizer"):
        if options.get(name) is not None:
            raise KernelInputError(f"{name} is given, but statistics are taken of every token alike")
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    check_linear(hidden, weight, bias)
    filled = with_defaults(options)
    filled["alpha"] = 0.0 if targets is None else 1.0
    plan = make_plan(
        filled,
        targets=targets,
        labels=labels,
        num_tokens=hidden.shape[0],
        vocab_size=weight.shape[0],
        like=hidden,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        return run_statistics(plan, hidden, weight, bias)
