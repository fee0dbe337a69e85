"""Checks of a call's tensors: shapes, dtypes and devices at every call, values where they are free to read.

All raise KernelInputError that names the argument, what was found and what is expected.
"""

import torch
from torch import Tensor

from potstill.kernels.divergences import DIVERGENCES
from potstill.kernels.settings import LossSettings, stored_temperature
from potstill.kernels.types import KernelInputError, SparseTargetTensors

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def reads_values(device: torch.device) -> bool:
    """Whether a look at values costs nothing there. Only then are they read: a look at a GPU's drains its queue."""
    return device.type == "cpu"


def check_tensor(
    name: str,
    value: Tensor,
    *,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """`value` has this shape, one of these dtypes, and lies on this device."""
    if tuple(value.shape) != shape:
        raise KernelInputError(f"{name} has shape {list(value.shape)}; expected {list(shape)}")
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise KernelInputError(f"{name} has dtype {str(value.dtype).removeprefix('torch.')}; expected {names}")
    if value.device != device:
        raise KernelInputError(f"{name} is on {value.device}; expected {device} like the logits' side")


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """hidden [N, D], weight [V, D], bias [V], of one floating dtype and device."""
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
    """logits [N, V] of a floating dtype."""
    if logits.dim() != 2 or logits.shape[1] < 1 or logits.dtype not in FLOAT_DTYPES:
        raise KernelInputError(
            f"logits have shape {list(logits.shape)} and dtype {logits.dtype}; expected [N, V] floats"
        )


def check_labels(labels: Tensor, *, num_tokens: int, vocab_size: int, device: torch.device, read: bool) -> None:
    """labels int64 [N], -100 or an id; their values only where that is free, or if `read`, which waits for a GPU.

    Unread, a label >= V makes the loss of its token NaN on a GPU (backend.py), and so does an id beyond V.
    """
    check_tensor("labels", labels, shape=(num_tokens,), dtypes=(torch.int64,), device=device)
    if (read or reads_values(device)) and num_tokens and int(labels.max()) >= vocab_size:
        raise KernelInputError(f"labels hold {int(labels.max())}; expected -100 or 0 .. {vocab_size - 1}")


def check_targets(
    targets: SparseTargetTensors | None,
    settings: LossSettings,
    *,
    num_tokens: int,
    vocab_size: int,
    device: torch.device,
) -> None:
    """Shapes, dtypes, devices and the pairing with the divergence; values only where they are free to read."""
    if targets is None:
        if settings.alpha != 0.0:
            raise KernelInputError(f"targets is None with alpha {settings.alpha}; pass targets, or alpha=0")
        return
    num_entries = targets.num_entries
    f32, i64 = (torch.float32,), (torch.int64,)
    check_tensor("targets.offsets", targets.offsets, shape=(num_tokens + 1,), dtypes=i64, device=device)
    check_tensor("targets.ids", targets.ids, shape=(num_entries,), dtypes=(torch.int32,), device=device)
    check_tensor("targets.log_tail", targets.log_tail, shape=(num_tokens,), dtypes=f32, device=device)
    if targets.logprobs is not None:
        check_tensor("targets.logprobs", targets.logprobs, shape=(num_entries,), dtypes=f32, device=device)
    if targets.log_weights is not None:
        check_tensor("targets.log_weights", targets.log_weights, shape=(num_entries,), dtypes=f32, device=device)
        if targets.counts is not None or targets.logprobs is not None:
            raise KernelInputError("targets.log_weights stand alone; counts and logprobs must be None beside them")
    if targets.counts is not None and tuple(targets.counts.shape) != (num_entries,):
        raise KernelInputError(f"targets.counts has shape {list(targets.counts.shape)}; expected {[num_entries]}")
    holds_draws = targets.counts is not None or targets.log_weights is not None
    if targets.logprobs is None and not holds_draws:
        raise KernelInputError("targets hold none of logprobs, counts and log_weights; expected one of them")
    check_draws(settings.divergence, holds_draws=holds_draws)
    if settings.needs_tail:
        tail_at(targets, settings.temperature)
    if reads_values(device) and num_entries:
        low, high = (int(bound) for bound in targets.ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise KernelInputError(f"targets.ids go from {low} to {high}; expected 0 .. {vocab_size - 1}")


def tail_at(targets: SparseTargetTensors, temperature: float) -> Tensor:
    """log_tail at a temperature (float32 [N]); KernelInputError where the targets do not carry it."""
    if temperature == 1.0:
        return targets.log_tail
    stored = stored_temperature(temperature, targets.log_tail_at)
    if stored is not None:
        return targets.log_tail_at[stored]
    raise KernelInputError(
        f"temperature is {temperature}, but the targets carry tails for {sorted(targets.log_tail_at)} besides"
        " 1.0: the tail at another temperature does not follow from the one at T = 1. Declare the"
        " temperature when dumping, or use missing_mass='renorm' or 'support'"
    )


def validate_targets(targets: SparseTargetTensors, *, vocab_size: int) -> None:
    """The checks that read every entry (and wait for a GPU): ids in range and distinct, values in range."""
    if targets.num_entries == 0:
        return
    counts = targets.offsets.diff()
    if int(targets.offsets[0]) != 0 or int(targets.offsets[-1]) != targets.num_entries or int(counts.min()) < 0:
        raise KernelInputError(f"targets.offsets do not run from 0 up to {targets.num_entries} in steps >= 0")
    row = torch.repeat_interleave(torch.arange(targets.num_tokens, device=targets.device), counts)
    ids = targets.ids.long()
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise KernelInputError(
            f"targets.ids go from {int(ids.min())} to {int(ids.max())}; expected 0 .. {vocab_size - 1}"
        )
    keys, _ = torch.sort(row * vocab_size + ids)
    repeated = (keys[1:] == keys[:-1]).nonzero()
    if repeated.numel():
        key = int(keys[int(repeated[0, 0])])
        raise KernelInputError(f"targets of token {key // vocab_size} name id {key % vocab_size} twice")
    if targets.logprobs is not None:
        mass = torch.zeros(targets.num_tokens, dtype=torch.float64, device=targets.device)
        mass.index_add_(0, row, targets.logprobs.double().exp())
        # Stored values sit on a 1/16-nat grid: 3.2 % each way at most, plus room for rounding.
        bad = ~(mass <= 1.04)
        if bool(bad.any()):
            token = int(bad.nonzero()[0, 0])
            raise KernelInputError(f"targets of token {token} have mass {float(mass[token]):.6g}; expected at most 1")
    if targets.log_weights is not None and not bool(torch.isfinite(targets.log_weights).all()):
        raise KernelInputError("targets.log_weights holds values that are not finite; an id of weight 0 is no entry")
    for value, name in ((targets.log_tail, "log_tail"), (targets.counts, "counts")):
        if value is not None and bool(torch.isnan(value.float()).any()):
            raise KernelInputError(f"targets.{name} holds NaN")


def check_draws(divergence: str, *, holds_draws: bool) -> None:
    """Raises KernelInputError unless a (known) divergence for draws meets draws, and any other log-probabilities."""
    needs_draws = DIVERGENCES[divergence].needs_counts
    if needs_draws and not holds_draws:
        raise KernelInputError(
            f"divergence {divergence!r} needs targets.counts or targets.log_weights (sampled targets)"
        )
    if holds_draws and not needs_draws:
        raise KernelInputError(
            f"divergence {divergence!r} needs targets.logprobs, and these targets hold draws; use divergence='sampled'"
        )
