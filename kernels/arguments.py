"""The options all loss functions share, and their way into one checked Plan."""

import difflib
import math
from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from potstill.kernels import backends
from potstill.kernels.fused_linear import Plan
from potstill.kernels.settings import (
    FLOAT_DTYPES,
    LossSettings,
    check_targets,
    check_tensor,
    make_settings,
    validate_targets,
)
from potstill.kernels.types import KernelInputError, SparseTargetTensors

CUDA_CHUNK_BYTES = 512 << 20
CPU_CHUNK_BYTES = 32 << 20


class LossOptions(TypedDict, total=False):
    """Keyword options of the loss functions, with their defaults.

    token_weights (None: all 1), kd_weights (None: all 1): float32 [N], >= 0; kd_weights multiplies the KD
        term only. Tokens with token_weights 0 are dropped before the first product: they cost nothing and
        their gradient is exactly 0, whatever values they hold.
    alpha (1), ce_weight (None: 1 - alpha), z_loss (0): weights of the parts.
    temperature (1): of the KD term, on both sides: T^2 then multiplies its loss and gradient alike.
    temperature_side ("both"): "teacher" tempers the targets alone; the student stays at 1, and so there is no T^2.
        Near 0 the target is the teacher's argmax (1e-20 will do; equals share).
    divergence ("forward_kl"), divergence_options (skew, beta, floor), missing_mass ("tail"): docs/kernels.md.
    soft_cap (None), logit_scale (1): z = cap * tanh(scale * raw / cap).
    normalizer (None: sum of token_weights): 0-d tensor, the global sum of weights. 0 makes the loss 0.
    chunk_bytes (None: 512 MiB on a GPU, 32 MiB on a CPU): bound of the logits kept at a time.
    num_active (None): number of tokens with a weight, if the host knows it; saves the one wait for the GPU
        that counting them takes.
    backend ("auto", by device and dtype): "torch", "triton", or "triton_compiled" (docs/kernels.md).
    validate (False): also check every entry (distinct ids, range, mass); waits for a GPU.
    """

    token_weights: Tensor | None
    kd_weights: Tensor | None
    alpha: float
    ce_weight: float | None
    temperature: float
    temperature_side: str
    divergence: str
    divergence_options: Mapping[str, float] | None
    missing_mass: str
    z_loss: float
    soft_cap: float | None
    logit_scale: float
    normalizer: Tensor | None
    chunk_bytes: int | None
    num_active: int | None
    backend: str
    validate: bool


DEFAULTS = LossOptions(
    token_weights=None,
    kd_weights=None,
    alpha=1.0,
    ce_weight=None,
    temperature=1.0,
    temperature_side="both",
    divergence="forward_kl",
    divergence_options=None,
    missing_mass="tail",
    z_loss=0.0,
    soft_cap=None,
    logit_scale=1.0,
    normalizer=None,
    chunk_bytes=None,
    num_active=None,
    backend="auto",
    validate=False,
)


def with_defaults(given: Mapping[str, Any]) -> LossOptions:
    """DEFAULTS updated by `given`; TypeError for a name that is no option."""
    for name in given:
        if name not in DEFAULTS:
            near = difflib.get_close_matches(name, DEFAULTS, n=1)
            raise TypeError(f"unknown loss option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    merged = LossOptions(**DEFAULTS)
    merged.update(given)  # type: ignore[typeddict-item]  # names checked above
    return merged


def under_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three in autocast's dtype where autocast is on (gradients flow through the cast)."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() != 2:
        raise KernelInputError(f"hidden has shape {list(hidden.shape)}; expected [N, D] (flatten batch and row)")
    if hidden.dtype not in FLOAT_DTYPES:
        raise KernelInputError(f"hidden has dtype {hidden.dtype}; expected a floating dtype")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] < 1:
        raise KernelInputError(
            f"weight has shape {list(weight.shape)}; expected [V, {hidden.shape[1]}]. An empty weight under"
            " ZeRO-3 means that the loss runs outside the module that owns the head"
        )
    dtypes, device = (hidden.dtype,), hidden.device
    check_tensor("weight", weight, shape=tuple(weight.shape), dtypes=dtypes, device=device)
    if bias is not None:
        check_tensor("bias", bias, shape=(weight.shape[0],), dtypes=dtypes, device=device)


def check_logits(logits: Tensor) -> None:
    if logits.dim() != 2 or logits.shape[1] < 1 or logits.dtype not in FLOAT_DTYPES:
        raise KernelInputError(
            f"logits have shape {list(logits.shape)} and dtype {logits.dtype}; expected [N, V] floats"
        )


def make_plan(
    options: LossOptions,
    *,
    targets: SparseTargetTensors | None,
    labels: Tensor,
    num_tokens: int,
    vocab_size: int,
    like: Tensor,
) -> Plan:
    """Checks everything but hidden states, head and logits (`like` is one of them) and lays out the call."""
    settings = make_settings(
        alpha=options["alpha"],
        ce_weight=options["ce_weight"],
        temperature=options["temperature"],
        temperature_side=options["temperature_side"],
        divergence=options["divergence"],
        missing_mass=options["missing_mass"],
        z_loss=options["z_loss"],
        soft_cap=options["soft_cap"],
        logit_scale=options["logit_scale"],
        options=options["divergence_options"],
    )
    device = like.device
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    backend = backends.choose(options["backend"], device, like.dtype)
    check_targets(targets, settings, num_tokens=num_tokens, vocab_size=vocab_size, device=device)
    _check_labels(labels, num_tokens, vocab_size, device, read=options["validate"] or device.type == "cpu")
    if options["validate"] and targets is not None:
        validate_targets(targets, vocab_size=vocab_size)
    token_weights = options["token_weights"]
    weights = _vector("token_weights", token_weights, num_tokens, dtype, device)
    return Plan(
        settings=settings,
        targets=targets,
        labels=labels,
        factors=_factors(settings, weights),
        weights=weights,
        kd_weights=_vector("kd_weights", options["kd_weights"], num_tokens, dtype, device),
        inverse_normalizer=_inverse_normalizer(options["normalizer"], weights),
        rows=None if token_weights is None else _active_rows(weights, options["num_active"]),
        chunk_rows=_chunk_rows(vocab_size, backend.slab_dtype(like.dtype), device, options["chunk_bytes"]),
        backend=backend,
        width=0 if targets is None else targets.width,
    )


def _check_labels(labels: Tensor, num_tokens: int, vocab_size: int, device: torch.device, *, read: bool) -> None:
    check_tensor("labels", labels, shape=(num_tokens,), dtypes=(torch.int64,), device=device)
    if read and num_tokens and int(labels.max()) >= vocab_size:
        raise KernelInputError(f"labels hold {int(labels.max())}; expected -100 or 0 .. {vocab_size - 1}")


def _vector(name: str, value: Tensor | None, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if value is None:
        return torch.ones(num_tokens, dtype=dtype, device=device)
    check_tensor(name, value, shape=(num_tokens,), dtypes=(torch.float32, torch.float64), device=device)
    return value.detach().to(dtype)


def _inverse_normalizer(normalizer: Tensor | None, weights: Tensor) -> Tensor:
    """1 / normalizer on the device of the weights (0-d), without a wait; 0 for 0."""
    if normalizer is None:
        normalizer = weights.sum()
    elif normalizer.numel() != 1:
        raise KernelInputError(f"normalizer has shape {list(normalizer.shape)}; expected a 0-d tensor")
    normalizer = normalizer.detach().to(device=weights.device, dtype=weights.dtype).reshape(())
    return torch.where(normalizer == 0, torch.zeros_like(normalizer), 1 / normalizer)


def _factors(settings: LossSettings, like: Tensor) -> Tensor:
    """alpha, ce_weight, z_loss [3], filled on the device: a copy from the host could wait for it."""
    values = (settings.alpha, settings.ce_weight, settings.z_loss)
    return torch.stack([torch.full((), v, dtype=like.dtype, device=like.device) for v in values])


def _active_rows(weights: Tensor, num_active: int | None) -> Tensor:
    """The tokens with weight != 0 in ascending order (int64 [M])."""
    if num_active is None:
        return weights.nonzero()[:, 0]
    if not 0 <= num_active <= weights.shape[0]:
        raise KernelInputError(f"num_active is {num_active}; expected 0 .. {weights.shape[0]}")
    # A stable sort of "has no weight" lists the others first, with a length that the host knows.
    return torch.argsort((weights == 0).to(torch.uint8), stable=True)[:num_active]


def logits_chunk_bytes(*, num_tokens: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of the logits that the fused losses hold at a time for `num_tokens` tokens, with the default budget.

    `dtype` is that of the head's weight, `device` where it would lie (nothing is put there).
    """
    backend = backends.choose("auto", device, dtype)
    wide = backend.slab_dtype(dtype)
    rows = min(num_tokens, _chunk_rows(vocab_size, wide, device, None))
    stride = -(-vocab_size // backend.row_alignment) * backend.row_alignment
    return rows * stride * wide.itemsize


def _chunk_rows(vocab_size: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int | None) -> int:
    """Rows of a chunk: as many as the budget holds, whole multiples of 128 above 128."""
    if chunk_bytes is None:
        chunk_bytes = CUDA_CHUNK_BYTES if device.type == "cuda" else CPU_CHUNK_BYTES
    if chunk_bytes < 1:
        raise KernelInputError(f"chunk_bytes is {chunk_bytes}; expected at least 1")
    rows = max(1, chunk_bytes // (vocab_size * math.ceil(torch.finfo(dtype).bits / 8)))
    return rows - rows % 128 if rows > 128 else rows
