"""The row passes as Triton kernels (launched from rows_triton.py; twins in rows_torch.py).

Shapes: B rows of a slab, V logits each, F fix-up columns per row (the kept ids and the label).
All arithmetic is float32, whatever the slab's dtype: bfloat16 has 8 bits, and a sum of V terms in it loses every term
below 1/256 of the sum. Only what is stored to the slab is rounded to its dtype, once.

One program per row, any V, int64 offsets of rows (B * V passes 2^31), rows on grid axis 0 only (the others end at
65535). A row is read in whole unmasked blocks and one masked remainder, because a mask over the whole row costs the
16-byte loads when V is odd. No autotuning: the kernels work in place, and a trial run would spoil the data.

The sums are those of an online softmax (Milakov and Gimelshein, arXiv 1805.02867): the running maximum is subtracted
before every exp2, so that no term is above 1, and the sums so far shrink whenever it grows. Maxima and sums are kept in
base 2, and the factor log2(e) / T rides on the multiply-add before each exp2: exp2 alone lowers to one instruction, exp
to six. With two temperatures one maximum serves both, for x -> x / T keeps the order.

The fix-up columns are taken out of the slab before the stream (overwritten with FILL, whose exponential is exactly 0):
the mass of the rest is then a sum of what is there, not `1 - sum q`, which loses all digits where the rest is small.
"""

import triton
import triton.language as tl

_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)
# Below every logit; a power of two, so that its products are exact and cancel also where a GPU fuses them.
_NONE = tl.constexpr(-(2.0**100))


@triton.jit
def _tanh(x):
    """tanh of x (any shape) from exp2, as the maths library is not there in the interpreter.

    Of |x|, so that the exponential is at most 1 and x of any size gives 1 and not inf / inf.
    """
    t = tl.exp2(tl.abs(x) * -2.8853900817779268)  # exp(-2 |x|)
    y = (1.0 - t) / (1.0 + t)
    return tl.where(x < 0, -y, y)


@triton.jit
def _capped(raw, scale, cap):
    """z = cap * tanh(scale * raw / cap); twin of soft_cap.scale_and_cap_."""
    return cap * _tanh(raw * (scale / cap))


@triton.jit
def _cap_slope(z, scale, cap):
    """dz / draw at z; twin of soft_cap.cap_slope."""
    ratio = tl.maximum(z * (1.0 / cap), -1.0)  # the maximum only tames columns that were taken out
    return scale * (1.0 - ratio * ratio)


@triton.jit
def _load(x, offsets, V, scale, cap, MASKED: tl.constexpr, CAP: tl.constexpr, FILL: tl.constexpr):
    """z float32 [BV] (before the scale when there is no cap: it rides on the multiply-add then).

    x: pointer to the row; offsets int32 [BV]: the columns of a block; beyond V they read FILL if MASKED.
    """
    if MASKED:
        raw = tl.load(x + offsets, mask=offsets < V, other=FILL).to(tl.float32)
    else:
        raw = tl.load(x + offsets).to(tl.float32)
    if CAP:
        # A column taken out must stay out; the cap would bring it back to -cap.
        return tl.where(raw == FILL, _NONE, _capped(raw, scale, cap))
    return raw


@triton.jit
def _accumulate(z, m, s, s_t, x, c, inv_t, TWO: tl.constexpr):
    """One block z [BV] into the running scalars: maximum m (base 2), sums s (T = 1) and s_t (T), x = sum of e * z.

    c: log2(e), times the scale that z lacks; inv_t: 1 / T. Returns the four.
    """
    new = tl.maximum(m, tl.max(z, 0) * c)
    shrink = tl.exp2(m - new)
    e = tl.exp2(z * c - new)
    s = s * shrink + tl.sum(e, 0)
    x = x * shrink + tl.sum(e * tl.maximum(z, _NONE), 0)  # 0 times a logit of -inf is to be 0
    if TWO:
        s_t = s_t * tl.exp2((m - new) * inv_t) + tl.sum(tl.exp2(z * (c * inv_t) - new * inv_t), 0)
    return new, s, s_t, x


@triton.jit
def _log_sum(m, s, empty):
    """Natural log of 2^m * s (scalars); -inf for an empty row. In the logarithm, as 2^m alone may overflow."""
    return tl.where(empty, -float("inf"), (m + tl.log2(tl.where(empty, 1.0, s))) * _LN2)


@triton.jit
def stats_kernel(
    x_ptr,  # [B, V] raw logits, row stride stride_x; the fix-up columns are overwritten with FILL
    id_ptr,  # int64 [B, F]
    used_ptr,  # uint8 [B, F]
    fix_ptr,  # float32 [B, F] out: z at the fix-ups, -inf where unused
    out_ptr,  # float32 [4, B] out: log_rest, log_rest_t, mean_rest, row_max
    stride_x,  # elements from one row of x to the next
    num_rows,  # B
    V,
    F,
    scale,  # of the logits, > 0
    cap,  # of the logits, > 0; 1 without CAP
    inv_t,  # 1 / T of the student
    BV: tl.constexpr,  # columns per step, a power of 2
    BF: tl.constexpr,  # F rounded up to a power of 2
    TWO: tl.constexpr,  # whether T is not 1: a second sum
    CAP: tl.constexpr,  # whether there is a soft cap
    FILL: tl.constexpr,  # finite in the dtype of x and far below every logit
):
    """One row: take the fix-ups out, then stream over the rest once. Twin of rows_torch.row_stats."""
    row = tl.program_id(0).to(tl.int64)
    x = x_ptr + row * stride_x
    f = tl.arange(0, BF)
    used = tl.load(used_ptr + row * F + f, mask=f < F, other=0) != 0
    ids = tl.load(id_ptr + row * F + f, mask=used, other=0)
    raw = tl.load(x + ids, mask=used, other=0.0).to(tl.float32)
    # All values are in registers before the columns leave the stream, and all are out before it starts. Several threads
    # may hold the same lane, and others stream over these columns: no step may overtake the one before.
    tl.debug_barrier()
    tl.store(x + ids, FILL, mask=used)
    tl.debug_barrier()
    c = _LOG2E if CAP else scale * _LOG2E
    fixed = _capped(raw, scale, cap) if CAP else raw * scale
    fixed = tl.where(used, tl.where(fixed < _NONE, _NONE, fixed), -float("inf"))  # NaN stays
    tl.store(fix_ptr + row * F + f, fixed, mask=f < F)

    m = tl.full((), _NONE, tl.float32)
    s = tl.full((), 0.0, tl.float32)
    s_t = tl.full((), 0.0, tl.float32)
    moment = tl.full((), 0.0, tl.float32)
    offsets = tl.arange(0, BV)
    whole = (V // BV) * BV
    for start in range(0, whole, BV):
        z = _load(x, start + offsets, V, scale, cap, False, CAP, FILL)
        m, s, s_t, moment = _accumulate(z, m, s, s_t, moment, c, inv_t, TWO)
    if whole < V:
        z = _load(x, whole + offsets, V, scale, cap, True, CAP, FILL)
        m, s, s_t, moment = _accumulate(z, m, s, s_t, moment, c, inv_t, TWO)

    # Nothing but taken-out columns: no rest at all.
    empty = m <= 0.5 * FILL * c
    mean = moment / tl.where(empty, 1.0, s)
    if not CAP:
        mean = mean * scale
    log_rest = _log_sum(m, s, empty)
    log_rest_t = _log_sum(m * inv_t, s_t, empty) if TWO else log_rest
    tl.store(out_ptr + row, log_rest)
    tl.store(out_ptr + num_rows + row, log_rest_t)
    tl.store(out_ptr + 2 * num_rows + row, tl.where(empty, 0.0, mean))
    tl.store(out_ptr + 3 * num_rows + row, tl.maximum(tl.where(empty, -float("inf"), m * _LN2), tl.max(fixed, 0)))


@triton.jit
def _gradient(z, c1, l1, w1, c2, l2, w2, scale, cap, TWO: tl.constexpr, CAP: tl.constexpr):
    """d loss / d raw [BV] at z [BV]: one or two softmaxes w * 2^(z c - l), each with its weight per row.

    The logarithm of the sum is subtracted inside the exponential, so that the softmax is at most 1 before w comes.
    """
    g = w1 * tl.exp2(z * c1 - l1)
    if TWO:
        g += w2 * tl.exp2(z * c2 - l2)
    if CAP:
        g = g * _cap_slope(z, scale, cap)
    return g


@triton.jit
def dense_grad_kernel(
    x_ptr,  # [B, V] the slab after stats_kernel; d loss / d raw logits when done
    id_ptr,  # int64 [B, F]
    used_ptr,  # uint8 [B, F]
    value_ptr,  # float32 [B, F] gradient by the raw logits at the fix-ups
    row_ptr,  # float32 [4, B]: first weight (times the slope's scale without a cap), first lse, second both
    stride_x,  # this and what follows: as in stats_kernel
    num_rows,
    V,
    F,
    scale,
    cap,
    inv_t,
    BV: tl.constexpr,
    BF: tl.constexpr,
    TWO: tl.constexpr,  # whether there is a second softmax, at T = 1
    CAP: tl.constexpr,
    FILL: tl.constexpr,
):
    """One row: the dense gradient over all columns, then the fix-ups on top. Twin of rows_torch.row_gradient."""
    row = tl.program_id(0).to(tl.int64)
    x = x_ptr + row * stride_x
    w1 = tl.load(row_ptr + row)
    l1 = tl.load(row_ptr + num_rows + row) * _LOG2E
    w2 = tl.load(row_ptr + 2 * num_rows + row)
    l2 = tl.load(row_ptr + 3 * num_rows + row) * _LOG2E
    plain = _LOG2E if CAP else scale * _LOG2E
    c1 = plain * inv_t
    offsets = tl.arange(0, BV)
    whole = (V // BV) * BV
    for start in range(0, whole, BV):
        z = _load(x, start + offsets, V, scale, cap, False, CAP, FILL)
        g = _gradient(z, c1, l1, w1, plain, l2, w2, scale, cap, TWO, CAP)
        tl.store(x + start + offsets, g)
    if whole < V:
        z = _load(x, whole + offsets, V, scale, cap, True, CAP, FILL)
        g = _gradient(z, c1, l1, w1, plain, l2, w2, scale, cap, TWO, CAP)
        tl.store(x + whole + offsets, g, mask=whole + offsets < V)
    f = tl.arange(0, BF)
    used = tl.load(used_ptr + row * F + f, mask=f < F, other=0) != 0
    ids = tl.load(id_ptr + row * F + f, mask=used, other=0)
    value = tl.load(value_ptr + row * F + f, mask=used, other=0.0)
    tl.debug_barrier()  # the dense pass of other threads wrote these columns too
    tl.store(x + ids, value, mask=used)
