"""The distillation loss: sparse teacher targets against logits, or against hidden states and a head.

    loss = 1 / normalizer * sum_n w_n [ alpha T^2 kd_n KD_n + ce_weight CE_n + z_loss lse_n^2 ]

Formulas: objective.py and divergences.py. Ten-minute tour: docs/kernels.md.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from potstill.kernels import backends
from potstill.kernels.fused_linear import FusedLinearLoss, FusedLoss, LinearTokenLosses, Plan
from potstill.kernels.settings import (
    FLOAT_DTYPES,
    LossSettings,
    check_combination,
    check_targets,
    check_tensor,
    make_settings,
    validate_targets,
)
from potstill.kernels.statistics import TokenStatistics, run_statistics
from potstill.kernels.types import (
    KernelInputError,
    LossSums,
    SelfCheckError,
    SparseTargetTensors,
)

__all__ = [
    "KernelInputError",
    "LossSums",
    "SelfCheckError",
    "SparseTargetTensors",
    "TokenStatistics",
    "check_combination",
    "linear_sparse_loss",
    "linear_sparse_losses",
    "sparse_loss",
    "token_statistics",
]

CUDA_CHUNK_BYTES = 512 << 20
CPU_CHUNK_BYTES = 32 << 20


@torch.compiler.disable
def linear_sparse_loss(
    *,
    hidden: Tensor,
    weight: Tensor,
    targets: SparseTargetTensors | None,
    labels: Tensor,
    token_weights: Tensor | None = None,
    kd_weights: Tensor | None = None,
    alpha: float = 1.0,
    ce_weight: float | None = None,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    missing_mass: str = "tail",
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    bias: Tensor | None = None,
    normalizer: Tensor | None = None,
    chunk_bytes: int | None = None,
    divergence_options: Mapping[str, float] | None = None,
    num_active: int | None = None,
    backend: str = "auto",
    validate: bool = False,
) -> tuple[Tensor, LossSums]:
    """The loss (0-d, float32; float64 for float64 inputs) and its parts, from hidden states and a head.

    hidden [N, D], weight [V, D], bias [V]: one floating dtype (under autocast they are cast to its dtype).
    targets: SparseTargetTensors of N tokens (ids < V), or None with alpha 0. labels: int64 [N], -100 none.
    token_weights, kd_weights: float32 [N], >= 0; the second multiplies the KD term only. Tokens of weight
        0 are dropped before the first product: no cost, gradient exactly 0, whatever their values.
    alpha, ce_weight (None: 1 - alpha), z_loss: weights of the parts. temperature: of both sides of the KD
        term; T^2 multiplies loss and gradient alike.
    divergence, divergence_options, missing_mass: see docs/kernels.md.
    z = soft_cap * tanh(logit_scale * (hidden weight^T + bias) / soft_cap), or without the cap.
    normalizer: 0-d tensor, the global sum of weights; None takes the sum of token_weights here. 0 gives 0.
    chunk_bytes: bound of the logits kept at a time (None: 512 MiB on a GPU, 32 MiB on a CPU).
    num_active: number of tokens with weight != 0 if the host knows it; saves the one wait for the GPU
        that counting them takes.
    validate: also check every entry (distinct ids, range, mass); waits for a GPU.

    Differentiable once in hidden, weight and bias; gradients are computed in the forward. Raises
    KernelInputError (a ValueError) that names the argument.
    """
    settings = make_settings(
        alpha=alpha,
        ce_weight=ce_weight,
        temperature=temperature,
        divergence=divergence,
        missing_mass=missing_mass,
        z_loss=z_loss,
        soft_cap=soft_cap,
        logit_scale=logit_scale,
        options=divergence_options,
    )
    hidden, weight, bias = _under_autocast(hidden, weight, bias)
    _check_linear(hidden, weight, bias)
    plan = _make_plan(
        settings,
        targets=targets,
        labels=labels,
        token_weights=token_weights,
        kd_weights=kd_weights,
        normalizer=normalizer,
        num_tokens=hidden.shape[0],
        vocab_size=weight.shape[0],
        like=hidden,
        chunk_bytes=chunk_bytes,
        num_active=num_active,
        backend=backend,
        validate=validate,
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
    token_weights: Tensor | None = None,
    kd_weights: Tensor | None = None,
    alpha: float = 1.0,
    ce_weight: float | None = None,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    missing_mass: str = "tail",
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    bias: Tensor | None = None,
    chunk_bytes: int | None = None,
    divergence_options: Mapping[str, float] | None = None,
    num_active: int | None = None,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor:
    """The summands of linear_sparse_loss, one per token [N], without the normalizer.

    Any upstream gradient per token is right here, because backward recomputes the logits; that is a
    fourth product, so take linear_sparse_loss when a weighted sum is all you want.
    """
    settings = make_settings(
        alpha=alpha,
        ce_weight=ce_weight,
        temperature=temperature,
        divergence=divergence,
        missing_mass=missing_mass,
        z_loss=z_loss,
        soft_cap=soft_cap,
        logit_scale=logit_scale,
        options=divergence_options,
    )
    hidden, weight, bias = _under_autocast(hidden, weight, bias)
    _check_linear(hidden, weight, bias)
    plan = _make_plan(
        settings,
        targets=targets,
        labels=labels,
        token_weights=token_weights,
        kd_weights=kd_weights,
        normalizer=None,
        num_tokens=hidden.shape[0],
        vocab_size=weight.shape[0],
        like=hidden,
        chunk_bytes=chunk_bytes,
        num_active=num_active,
        backend=backend,
        validate=validate,
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
    token_weights: Tensor | None = None,
    kd_weights: Tensor | None = None,
    alpha: float = 1.0,
    ce_weight: float | None = None,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    missing_mass: str = "tail",
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    normalizer: Tensor | None = None,
    chunk_bytes: int | None = None,
    divergence_options: Mapping[str, float] | None = None,
    num_active: int | None = None,
    backend: str = "auto",
    validate: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, LossSums]:
    """linear_sparse_loss from given raw logits [N, V].

    inplace: the gradient overwrites `logits`, whose values are lost to the caller; saves N V elements.
    """
    settings = make_settings(
        alpha=alpha,
        ce_weight=ce_weight,
        temperature=temperature,
        divergence=divergence,
        missing_mass=missing_mass,
        z_loss=z_loss,
        soft_cap=soft_cap,
        logit_scale=logit_scale,
        options=divergence_options,
    )
    if logits.dim() != 2 or logits.shape[1] < 1 or logits.dtype not in FLOAT_DTYPES:
        raise KernelInputError(
            f"logits have shape {list(logits.shape)} and dtype {logits.dtype}; expected [N, V] floats"
        )
    plan = _make_plan(
        settings,
        targets=targets,
        labels=labels,
        token_weights=token_weights,
        kd_weights=kd_weights,
        normalizer=normalizer,
        num_tokens=logits.shape[0],
        vocab_size=logits.shape[1],
        like=logits,
        chunk_bytes=chunk_bytes,
        num_active=num_active,
        backend=backend,
        validate=validate,
    )
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    loss, sums = FusedLoss.apply(logits, plan, needs_grad, inplace)
    return loss, LossSums.unstack(sums)


@torch.compiler.disable
def token_statistics(
    *,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    targets: SparseTargetTensors | None = None,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    missing_mass: str = "tail",
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    bias: Tensor | None = None,
    chunk_bytes: int | None = None,
    divergence_options: Mapping[str, float] | None = None,
    backend: str = "auto",
) -> TokenStatistics:
    """Label log-probability, entropy and divergence of every token, chunked and without gradients.

    Arguments as in linear_sparse_loss; without targets the divergence is 0.
    """
    settings = make_settings(
        alpha=0.0 if targets is None else 1.0,
        ce_weight=0.0,
        temperature=temperature,
        divergence=divergence,
        missing_mass=missing_mass,
        z_loss=0.0,
        soft_cap=soft_cap,
        logit_scale=logit_scale,
        options=divergence_options,
    )
    hidden, weight, bias = _under_autocast(hidden, weight, bias)
    _check_linear(hidden, weight, bias)
    plan = _make_plan(
        settings,
        targets=targets,
        labels=labels,
        token_weights=None,
        kd_weights=None,
        normalizer=None,
        num_tokens=hidden.shape[0],
        vocab_size=weight.shape[0],
        like=hidden,
        chunk_bytes=chunk_bytes,
        num_active=None,
        backend=backend,
        validate=False,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        return run_statistics(plan, hidden, weight, bias)


def _under_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() != 2:
        raise KernelInputError(f"hidden has shape {list(hidden.shape)}; expected [N, D] (flatten batch and row)")
    if hidden.dtype not in FLOAT_DTYPES:
        raise KernelInputError(f"hidden has dtype {hidden.dtype}; expected a floating dtype")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] < 1:
        raise KernelInputError(
            f"weight has shape {list(weight.shape)}; expected [V, {hidden.shape[1]}]. An empty weight under"
            " ZeRO-3 means that the loss runs outside the module that owns the head"
        )
    check_tensor("weight", weight, shape=tuple(weight.shape), dtypes=(hidden.dtype,), device=hidden.device)
    if bias is not None:
        check_tensor("bias", bias, shape=weight.shape[:1], dtypes=(hidden.dtype,), device=hidden.device)


def _make_plan(
    settings: LossSettings,
    *,
    targets: SparseTargetTensors | None,
    labels: Tensor,
    token_weights: Tensor | None,
    kd_weights: Tensor | None,
    normalizer: Tensor | None,
    num_tokens: int,
    vocab_size: int,
    like: Tensor,
    chunk_bytes: int | None,
    num_active: int | None,
    backend: str,
    validate: bool,
) -> Plan:
    device = like.device
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    chosen = backends.choose(backend, device)
    shape = (num_tokens,)
    check_tensor("labels", labels, shape=shape, dtypes=(torch.int64,), device=device)
    check_targets(targets, settings, num_tokens=num_tokens, vocab_size=vocab_size, device=device)
    if validate and targets is not None:
        validate_targets(targets, vocab_size=vocab_size)
    if (validate or device.type == "cpu") and num_tokens and int(labels.max()) >= vocab_size:
        raise KernelInputError(f"labels hold {int(labels.max())}; expected -100 or 0 .. {vocab_size - 1}")
    vectors = []
    for name, value in (("token_weights", token_weights), ("kd_weights", kd_weights)):
        if value is None:
            vectors.append(torch.ones(shape, dtype=dtype, device=device))
        else:
            check_tensor(name, value, shape=shape, dtypes=(torch.float32, torch.float64), device=device)
            vectors.append(value.detach().to(dtype))
    if normalizer is None:
        normalizer = vectors[0].sum()
    elif normalizer.numel() != 1:
        raise KernelInputError(f"normalizer has shape {list(normalizer.shape)}; expected a 0-d tensor")
    normalizer = normalizer.detach().to(device=device, dtype=dtype).reshape(())
    return Plan(
        settings=settings,
        targets=targets,
        labels=labels,
        weights=vectors[0],
        kd_weights=vectors[1],
        inverse_normalizer=torch.where(normalizer == 0, 0.0, 1 / normalizer),
        rows=None if token_weights is None else _active_rows(vectors[0], num_active),
        chunk_rows=_chunk_rows(vocab_size, chosen.slab_dtype(like.dtype), device, chunk_bytes),
        backend=chosen,
        width=0 if targets is None else targets.width,
    )


def _active_rows(weights: Tensor, num_active: int | None) -> Tensor:
    """The tokens with weight != 0 in ascending order (int64 [M])."""
    if num_active is None:
        return weights.nonzero()[:, 0]
    if not 0 <= num_active <= weights.shape[0]:
        raise KernelInputError(f"num_active is {num_active}; expected 0 .. {weights.shape[0]}")
    # A stable sort of "has no weight" lists the others first, with a length that the host knows.
    return torch.argsort((weights == 0).to(torch.uint8), stable=True)[:num_active]


def _chunk_rows(vocab_size: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int | None) -> int:
    """Rows of a chunk: as many as the budget holds, whole multiples of 128 above 128."""
    if chunk_bytes is None:
        chunk_bytes = CUDA_CHUNK_BYTES if device.type == "cuda" else CPU_CHUNK_BYTES
    if chunk_bytes < 1:
        raise KernelInputError(f"chunk_bytes is {chunk_bytes}; expected at least 1")
    rows = max(1, chunk_bytes // (vocab_size * math.ceil(torch.finfo(dtype).bits / 8)))
    return rows - rows % 128 if rows > 128 else rows
