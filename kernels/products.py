"""The three matrix products of the chunked linear loss, with the precision each device can give.

A CUDA slab has the dtype of the weight (tensor cores accumulate in float32, one rounding). Elsewhere the
slab is float32, or float64 for float64 inputs, and low-precision weights are widened a block at a time, so
that no full copy of the head is made.
"""

import torch
from torch import Tensor

# Rows of the head that are widened at a time: 4096 x 4096 floats are 64 MiB.
BLOCK_ROWS = 4096


def _blocks(weight: Tensor) -> list[slice]:
    return [slice(start, start + BLOCK_ROWS) for start in range(0, weight.shape[0], BLOCK_ROWS)]


def has_wide_output() -> bool:
    """Whether torch.mm and torch.addmm take `out_dtype` (CUDA, torch 2.8 and later)."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return (major, minor) >= (2, 8)


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> Tensor:
    """hidden [B, D] times weight [V, D] transposed, plus bias [V], into out [B, V]."""
    if out.dtype == weight.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif weight.is_cuda and out.dtype == torch.float32 and has_wide_output():
        torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    else:
        wide = hidden.to(out.dtype)
        for block in _blocks(weight):
            out[:, block] = wide @ weight[block].to(out.dtype).t()
    if bias is not None:
        out += bias.to(out.dtype)
    return out


def hidden_gradient(slab: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
    """slab [B, V] times weight [V, D], into out [B, D] of the dtype of the weight."""
    if slab.dtype == weight.dtype:
        return torch.mm(slab, weight, out=out)
    total = slab.new_zeros(slab.shape[0], weight.shape[1])
    for block in _blocks(weight):
        total.addmm_(slab[:, block], weight[block].to(slab.dtype))
    return out.copy_(total)


def add_weight_gradient(total: Tensor, slab: Tensor, hidden: Tensor, *, first: bool) -> None:
    """total [V, D] (float32 or float64) += slab [B, V] transposed times hidden [B, D]; = if `first`."""
    beta = 0 if first else 1
    if slab.dtype == total.dtype and first:
        torch.mm(slab.t(), hidden.to(total.dtype), out=total)
    elif slab.dtype == total.dtype:
        total.addmm_(slab.t(), hidden.to(total.dtype))
    elif slab.is_cuda and has_wide_output():
        torch.addmm(total, slab.t(), hidden, out_dtype=total.dtype, beta=beta, out=total)
    else:
        product = torch.mm(slab.t(), hidden)
        if first:
            total.copy_(product)
        else:
            total += product


def add_bias_gradient(total: Tensor, slab: Tensor, *, first: bool) -> None:
    """total [V] (float32 or float64) += the sum of slab [B, V] over its rows; = if `first`."""
    if first:
        torch.sum(slab, 0, dtype=total.dtype, out=total)
    else:
        total += slab.sum(0, dtype=total.dtype)


def scale(value: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """value * factor (0-d) in `dtype`; the cast and the factor in one pass, in place where there is no cast."""
    if value.dtype == dtype:
        # Reading the factor is free on a CPU, and it is 1 more often than not.
        if value.device.type != "cpu" or float(factor) != 1.0:
            value.mul_(factor.to(dtype) if dtype == torch.float64 else factor)
        return value
    out = torch.empty(value.shape, dtype=dtype, device=value.device)
    return torch.mul(value, factor.to(value.dtype), out=out)
