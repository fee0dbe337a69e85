"""What backward launches on a GPU: a gradient times a factor, and the last chunk's part of the head's gradient.

Twins: products.scale; products.add_weight_gradient and products.scale one after the other.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from potstill.kernels import products
from potstill.kernels.device_guard import on_device_of

SCALE_BLOCK = 4096  # elements at a time: 16 a thread of 8 warps
PROGRAMS_PER_PROCESSOR = 4  # as many of 256 threads as 64 registers each leave room for
# 128 x 256 outputs per program, 64 tokens at a time: 147 KB of shared memory with three stages.
WEIGHT_TILE: dict[str, int] = {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}


@triton.jit
def scale_kernel(
    x_ptr,  # [count], any floating dtype
    out_ptr,  # [count], x_ptr itself or memory of its own, any floating dtype
    factor_ptr,  # float32 [1]
    count,
    num_blocks,  # count / BLOCK, rounded up
    INPLACE: tl.constexpr,  # whether out is x: then nothing is read or written when the factor is 1
    BLOCK: tl.constexpr,  # elements at a time
):
    """out = x * factor, by as many programs as the device holds at a time: they start once, whatever the factor is."""
    factor = tl.load(factor_ptr)
    last = num_blocks
    if INPLACE:
        last = tl.where(factor == 1.0, 0, num_blocks)
    step = tl.num_programs(0)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(tl.program_id(0), last, step):
        inside = offsets < count
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + offsets, x * factor, mask=inside)
        offsets += step.to(tl.int64) * BLOCK


@triton.jit
def weight_gradient_kernel(
    slab_ptr,  # [B, V] gradient by the logits, row stride stride_slab
    hidden_ptr,  # [B, D] of the slab's dtype, row stride stride_hidden
    total_ptr,  # float32 [V, D] of the chunks before; anything without ADDS
    factor_ptr,  # float32 [1]
    out_ptr,  # [V, D] of the head's dtype
    B,
    V,
    D,
    stride_slab,
    stride_hidden,
    ADDS: tl.constexpr,  # whether there is a total
    BM: tl.constexpr,  # ids per program
    BN: tl.constexpr,  # hidden units per program
    BK: tl.constexpr,  # tokens at a time
    GROUP: tl.constexpr,  # rows of the grid of tiles that go together
):
    """out = (total + slab^T hidden) * factor: the sum in float32, rounded once.

    Tiles go in groups of GROUP rows, so that those in flight share their columns of the slab and of the hidden states
    in L2 (the ordering of triton's matrix multiplication tutorial).
    """
    program = tl.program_id(0)
    rows_m = tl.cdiv(V, BM)
    rows_n = tl.cdiv(D, BN)
    group = program // (GROUP * rows_n)
    size = tl.minimum(rows_m - group * GROUP, GROUP)
    inner = program % (GROUP * rows_n)
    m = (group * GROUP + inner % size) * BM + tl.arange(0, BM)
    n = (inner // size) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # Pointers that move on, since B * V may pass 2^31.
    slab = slab_ptr + k[:, None].to(tl.int64) * stride_slab + m[None, :]
    hidden = hidden_ptr + k[:, None].to(tl.int64) * stride_hidden + n[None, :]
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, B, BK):
        inside = (k < B - start)[:, None]
        g = tl.load(slab, mask=inside & (m < V)[None, :], other=0.0)
        h = tl.load(hidden, mask=inside & (n < D)[None, :], other=0.0)
        total = tl.dot(tl.trans(g), h, total)
        slab += BK * stride_slab
        hidden += BK * stride_hidden
    factor = tl.load(factor_ptr)
    # In two halves of the columns: the whole tile beside what was there before does not fit into the registers.
    left, right = tl.split(tl.permute(tl.reshape(total, (BM, 2, BN // 2)), (0, 2, 1)))
    half = (inner // size) * BN + tl.arange(0, BN // 2)
    place = m[:, None].to(tl.int64) * D + half[None, :]
    inside = (m < V)[:, None] & (half < D)[None, :]
    if ADDS:
        left += tl.load(total_ptr + place, mask=inside, other=0.0)
    tl.store(out_ptr + place, left * factor, mask=inside)
    inside = (m < V)[:, None] & (half + BN // 2 < D)[None, :]
    if ADDS:
        right += tl.load(total_ptr + place + BN // 2, mask=inside, other=0.0)
    tl.store(out_ptr + place + BN // 2, right * factor, mask=inside)


@functools.cache
def _programs(device: torch.device) -> int:
    """As many programs of the scale kernel as a device runs at a time, about."""
    if device.type != "cuda":
        return PROGRAMS_PER_PROCESSOR
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def scale(value: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Twin of products.scale: in place, it reads the factor on the GPU and touches nothing when that is 1."""
    if not value.is_contiguous() or torch.float64 in (value.dtype, dtype):
        return products.scale(value, factor, dtype)
    out = value if value.dtype == dtype else torch.empty(value.shape, dtype=dtype, device=value.device)
    count = value.numel()
    num_blocks = triton.cdiv(count, SCALE_BLOCK)
    if count:
        with on_device_of(value):
            scale_kernel[(min(num_blocks, _programs(value.device)),)](
                value,
                out,
                factor.float().reshape(1),
                count,
                num_blocks,
                INPLACE=out is value,
                BLOCK=SCALE_BLOCK,
                num_warps=8,
            )
    return out


def weight_gradient(total: Tensor | None, slab: Tensor, hidden: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """(total [V, D] float32, or 0 if None, + slab [B, V] transposed times hidden [B, D]) * factor (0-d), in `dtype`.

    slab and hidden: of one dtype of 16 bits, unit column strides. total is left as it is.
    """
    num_rows, vocab_size = slab.shape
    width = hidden.shape[1]
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    out = torch.empty(vocab_size, width, dtype=dtype, device=slab.device)
    tile = WEIGHT_TILE
    programs = triton.cdiv(vocab_size, tile["BM"]) * triton.cdiv(width, tile["BN"])
    with on_device_of(slab):
        weight_gradient_kernel[(programs,)](
            slab,
            hidden,
            out if total is None else total,
            factor.float().reshape(1),
            out,
            num_rows,
            vocab_size,
            width,
            slab.stride(0),
            hidden.stride(0),
            ADDS=total is not None,
            **tile,
        )
    return out
