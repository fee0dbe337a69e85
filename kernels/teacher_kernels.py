"""The teacher's stream as a Triton kernel (launched from teacher_triton.py; twin of tiles.tile_stats).

`tile_kernel` streams over the logits once, as they are given (any floating dtype, row stride and width), and keeps
figures of every tile of WIDTH ids: about a tenth of the bytes of bfloat16 logits. teacher_select.py reads those and the
few tiles that can hold one of the k best.

All arithmetic is float32. A sum of exponentials is relative to its own tile's maximum, and moved to the row's later.
"""

import triton
import triton.language as tl

from potstill.kernels.triton_kernels import _capped

_LOG2E = tl.constexpr(1.4426950408889634)
# As in tiles.py: -Inf logits and the columns beyond the vocabulary are read as this.
_FILL = tl.constexpr(-1e30)


@triton.jit
def _logits(
    x,  # pointer to the row
    columns,  # int32, any shape
    inside,  # bool of that shape; only read if MASKED
    scale,
    cap,
    SCALED: tl.constexpr,  # whether scale is not 1
    CAP: tl.constexpr,  # whether there is a soft cap
    MASKED: tl.constexpr,
):
    """z float32 of raw logits, -Inf (and all below _FILL) as _FILL; _FILL outside. NaN stays NaN."""
    raw = tl.load(x + columns, mask=inside, other=0.0) if MASKED else tl.load(x + columns)
    z = raw.to(tl.float32)
    if CAP:
        z = _capped(z, scale, cap)
    elif SCALED:
        z = z * scale
    # Not a maximum: that would drop a NaN.
    z = tl.where(z < _FILL, _FILL, z)
    return tl.where(inside, z, _FILL) if MASKED else z


@triton.jit
def _order_key(z):
    """uint32 keys > 0 of float32 z that sort as the values do; one key for both zeros, the largest for any NaN."""
    bits = z.to(tl.int32, bitcast=True)
    bits = tl.where(z == 0.0, 0, bits)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(z != z, 0x7FFFFFFF, ordered)
    return ordered.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _value_of(key):
    """float32 values of `_order_key`s; 0.0 for either zero."""
    ordered = (key ^ 0x80000000).to(tl.int32, bitcast=True)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _value_below(value):
    """The next float32 below a scalar value, so that `z >= value` is `z > below`; some NaN or Inf for NaN."""
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(value > 0.0, bits - 1, bits + 1)
    bits = tl.where(value == 0.0, -0x7FFFFFFF, bits)  # the largest negative subnormal
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _tile_block(
    x,
    stats,  # pointer to the row's figures
    start,  # first tile of the block
    above,  # int32 [TPP, WIDTH // VEC]: how many logits came before the label's so far
    logit,  # the label's
    below,  # the float32 below it
    label_tile,
    inv_ptr,
    stat_stride,
    V,
    num_tiles,
    scale,
    cap,
    NT: tl.constexpr,
    TPP: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    SCALED: tl.constexpr,
    CAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Figures of TPP tiles to memory; returns `above`."""
    tile = start + tl.arange(0, TPP)
    # Three axes, the last one what a thread loads at once: sums over it need no exchange between threads.
    columns = (
        tile[:, None, None] * WIDTH + tl.arange(0, WIDTH // VEC)[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]
    )
    z = _logits(x, columns, columns < V, scale, cap, SCALED, CAP, MASKED)
    best = tl.max(tl.max(z, 2), 1)
    # Tiles before the label's hold lower ids: there an equal logit comes before it. Equal ones in its own tile are
    # counted by the other kernel.
    bound = tl.where(tile < label_tile, below, logit)
    above += tl.sum((z > bound[:, None, None]).to(tl.int32), 2)
    difference = z - best[:, None, None]
    e = tl.exp2(difference * _LOG2E)
    total = tl.sum(tl.sum(e, 2), 1)
    moment = tl.sum(tl.sum(difference * e, 2), 1)
    inside = tile < num_tiles
    # A maximum may pass NaN over; the sum does not, nor does it stay finite at +Inf. Either is largest of all.
    best = tl.where((total != total) & (best < float("inf")), float("nan"), best)
    tl.store(stats + tile, best, mask=inside)
    tl.store(stats + stat_stride + tile, moment, mask=inside)
    tl.store(stats + 2 * stat_stride + tile, total, mask=inside)
    for number in tl.static_range(1, NT + 1):
        factor = tl.load(inv_ptr + number) * _LOG2E
        total = tl.sum(tl.sum(tl.exp2(difference * factor), 2), 1)
        tl.store(stats + (2 + number) * stat_stride + tile, total, mask=inside)
    return above


@triton.jit
def tile_kernel(
    x_ptr,  # [B, >= V] raw logits, unit column stride
    label_ptr,  # int64 [B]; what is not one of 0 .. V - 1 gives a count without a meaning
    inv_ptr,  # float32 [1 + NT]: 1, then 1 / T of the further temperatures
    stats_ptr,  # float32 [B, 3 + NT, stat_stride] out: per tile its maximum m, the sum of (z - m) exp(z - m), and
    # the sums of exp((z - m) / T) for T = 1 and the further temperatures
    above_ptr,  # int32 [B, parts] out: logits that come before the label's, but for equal ones in its own tile
    stride_x,  # elements from one row of x to the next
    stat_stride,  # floats from one figure of a row to the next, >= n
    V,
    num_tiles,  # n
    parts,  # programs per row
    tiles_per_part,  # a multiple of TPP
    scale,  # of the logits, > 0
    cap,  # of the logits, > 0; 1 without CAP
    NT: tl.constexpr,  # how many further temperatures
    TPP: tl.constexpr,  # tiles per step
    WIDTH: tl.constexpr,  # ids per tile
    VEC: tl.constexpr,  # ids per 16 bytes
    SCALED: tl.constexpr,
    CAP: tl.constexpr,
):
    """Some tiles of one row, in whole unmasked steps and one masked remainder: a mask costs odd V its wide loads."""
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    part = program % parts
    x = x_ptr + row * stride_x
    stats = stats_ptr + row * stat_stride * (3 + NT)
    label = tl.load(label_ptr + row)
    column = tl.where((label >= 0) & (label < V), label, 0).to(tl.int32)
    logit = _logits(x, column, column >= 0, scale, cap, SCALED, CAP, False)
    below = _value_below(logit)
    label_tile = column // WIDTH
    above = tl.zeros((TPP, WIDTH // VEC), tl.int32)
    first = part * tiles_per_part
    last = tl.minimum(first + tiles_per_part, num_tiles)
    whole = tl.minimum(last, (V // (TPP * WIDTH)) * TPP)
    for start in range(first, whole, TPP):
        above = _tile_block(
            x, stats, start, above, logit, below, label_tile, inv_ptr, stat_stride, V, num_tiles, scale, cap,
            NT, TPP, WIDTH, VEC, SCALED, CAP, False,
        )  # fmt: skip
    if whole < last:
        start = tl.maximum(first, whole)
        above = _tile_block(
            x, stats, start, above, logit, below, label_tile, inv_ptr, stat_stride, V, num_tiles, scale, cap,
            NT, TPP, WIDTH, VEC, SCALED, CAP, True,
        )  # fmt: skip
    tl.store(above_ptr + program, tl.sum(tl.sum(above, 1), 0))
