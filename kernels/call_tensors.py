"""The small tensors of a call, with as few launches as can be: each costs the host as long as a whole kernel takes.

What depends on numbers of the host alone (factors, weights of 1, the inverse of a count) is made once and kept.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from potstill.kernels.checks import check_tensor
from potstill.kernels.settings import LossSettings
from potstill.kernels.types import KernelInputError, LossSums


def on_stream(
    make: Callable[..., Tensor], values: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """make(values, dtype, device), kept for later calls on the same stream; such a tensor is never written to.

    Of the same stream only, because on another one it might be read before it is filled. Not while a CUDA graph is
    captured: a graph must own what it reads, and this store may let go of it.
    """
    if device.type != "cuda":
        return make(values, dtype, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return make.__wrapped__(values, dtype, device, 0)  # type: ignore[attr-defined]
    return make(values, dtype, device, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=64)
def _row(values: tuple[float, ...], dtype: torch.dtype, device: torch.device, _stream: int) -> Tensor:
    """The values as a tensor, filled on the device: a copy from the host could wait for it."""
    with torch.inference_mode(False):
        filled = torch.empty(len(values), dtype=dtype, device=device)
        for place, value in zip(filled.unbind(0), values, strict=True):
            place.fill_(value)
        return filled


@functools.lru_cache(maxsize=8)
def _ones(values: tuple[float, ...], dtype: torch.dtype, device: torch.device, _stream: int) -> Tensor:
    """values[0] times a 1."""
    with torch.inference_mode(False):
        return torch.ones(int(values[0]), dtype=dtype, device=device)


def factors(settings: LossSettings, dtype: torch.dtype, device: torch.device) -> Tensor:
    """alpha, ce_weight, z_loss, off_weight [4]."""
    values = (settings.alpha, settings.label_weight, settings.z_loss, settings.off_weight)
    return on_stream(_row, values, dtype, device)


def vector(name: str, value: Tensor | None, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`value` [N] checked and in `dtype`; 1 everywhere (not to be written to) where there is none."""
    if value is None:
        return on_stream(_ones, (num_tokens,), dtype, device)
    check_tensor(name, value, shape=(num_tokens,), dtypes=(torch.float32, torch.float64), device=device)
    return value.detach().to(dtype)


def groups(
    value: Tensor | None, sums: Tensor | None, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """`value` int64 [N], checked along with the sums [G, 14] that go with it. Raises KernelInputError."""
    if value is None and sums is None:
        return None
    if value is None or sums is None:
        raise KernelInputError("groups and group_sums go together, and one of them is None; give both, or neither")
    check_tensor("groups", value, shape=(num_tokens,), dtypes=(torch.int64,), device=device)
    num_figures = len(LossSums.names())
    if sums.dim() != 2 or sums.shape[1] != num_figures:
        raise KernelInputError(f"group_sums has shape {list(sums.shape)}; expected [groups, {num_figures}]")
    check_tensor("group_sums", sums, shape=tuple(sums.shape), dtypes=(dtype,), device=device)
    return value


def inverse_normalizer(
    normalizer: Tensor | None, token_weights: Tensor | None, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """1 / normalizer (None: the sum of token_weights, None: all 1) on the device (0-d), without a wait; 0 for 0."""
    if normalizer is None and token_weights is None:
        return on_stream(_row, (1 / num_tokens if num_tokens else 0.0,), dtype, device)[0]
    if normalizer is None:
        assert token_weights is not None
        normalizer = token_weights.detach().to(dtype).sum()
    elif normalizer.numel() != 1:
        raise KernelInputError(f"normalizer has shape {list(normalizer.shape)}; expected a 0-d tensor")
    normalizer = normalizer.detach().to(device=device, dtype=dtype).reshape(())
    # 1 / 0 is the only infinity there can be: no sum of weights is below 1e-38. A NaN stays one.
    return normalizer.reciprocal().nan_to_num_(nan=float("nan"), posinf=0.0, neginf=0.0)


def active_rows(token_weights: Tensor | None, num_active: int | None) -> Tensor | None:
    """The tokens with weight != 0 in ascending order (int64 [M]); None where the host knows that all have one."""
    if token_weights is None:
        return None
    if num_active is None:
        return token_weights.nonzero()[:, 0]
    num_tokens = token_weights.shape[0]
    if not 0 <= num_active <= num_tokens:
        raise KernelInputError(f"num_active is {num_active}; expected 0 .. {num_tokens}")
    if num_active == num_tokens:
        return None
    # A stable sort of "has no weight" lists the others first, with a length that the host knows.
    return torch.argsort((token_weights == 0).view(torch.uint8), stable=True)[:num_active]
