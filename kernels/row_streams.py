"""What a row kernel does along a whole row of V logits: two streams over it, and the columns that they leave out.

Tiles are [U, R, C]: each of R threads holds U times C neighbours, a load of 16 bytes each, and all U leave together. A
row is read in whole tiles, then in tiles of one load, and the ragged rest under a mask: a mask over the whole row would
cost the wide loads where V is odd. All arithmetic is float32; see row_kernel.py for what the numbers are.
"""

import triton
import triton.language as tl

from potstill.kernels.divergences_triton import NONE

# A gap to the maximum, in base 2, beyond which all is 0; finite, so that 0 times it is 0.
FAR = tl.constexpr(-1e5)


@triton.jit
def _tanh(x):
    """tanh from exp2 of -2 |x| <= 0, so that x of any size gives 1 and not inf / inf."""
    t = tl.exp2(tl.abs(x) * -2.8853900817779268)
    y = (1.0 - t) / (1.0 + t)
    return tl.where(x < 0, -y, y)


@triton.jit
def _logit(raw, scale, cap, CAP: tl.constexpr):
    """z (any shape, float32) of raw logits; without a cap the raw ones, whose scale comes later."""
    return cap * _tanh(raw * (scale / cap)) if CAP else raw


@triton.jit
def slope_of(z, scale, cap, CAP: tl.constexpr):
    """dz / draw at z; twin of soft_cap.cap_slope."""
    if CAP:
        ratio = tl.minimum(tl.maximum(z * (1.0 / cap), -1.0), 1.0)  # only tames columns that were taken out
        return scale * (1.0 - ratio * ratio)
    else:
        return scale


@triton.jit
def _tile(U: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Offsets int32 [U, R, C] of a tile's elements: U loads of each thread, which leave together."""
    column = tl.arange(0, R)[None, :, None] * C + tl.arange(0, C)[None, None, :]
    return tl.arange(0, U)[:, None, None] * (R * C) + column


@triton.jit
def _load(x, offsets, V, scale, cap, MASKED: tl.constexpr, CAP: tl.constexpr, FILL: tl.constexpr, KEEP: tl.constexpr):
    """z float32 [U, R, C] of the row x; FILL beyond V. KEEP: "evict_last" for what will be read again."""
    if MASKED:
        raw = tl.load(x + offsets, mask=offsets < V, other=FILL, eviction_policy=KEEP).to(tl.float32)
    else:
        raw = tl.load(x + offsets, eviction_policy=KEEP).to(tl.float32)
    if CAP:
        # A column taken out must stay out; the cap would bring it back to -cap.
        return tl.where(raw == FILL, NONE, _logit(raw, scale, cap, True))
    return raw


@triton.jit
def special(x, at, inside, scale, cap, CAP: tl.constexpr):
    """z at the columns `at` where `inside`, NONE elsewhere and for -inf."""
    raw = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    z = _logit(raw, scale, cap, CAP)
    return tl.where(inside & (z >= NONE), z, tl.where(inside & (z != z), z, NONE))


# Several sums or maxima over one axis cost one exchange between the warps, not one each.
@triton.jit
def add2(a, b, c, d):
    return a + c, b + d


@triton.jit
def add3(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def add4(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def add_and_tops(code, z, p, code_too, z_too, p_too):
    return code + code_too, tl.maximum(z, z_too), tl.maximum(p, p_too)


@triton.jit
def _over_thread(value):
    """Sum [R] of a tile [U, R, C]: within each thread."""
    return tl.sum(tl.sum(value, 2), 0)


@triton.jit
def _accumulate(z, state, c, inv_t, TWO: tl.constexpr):
    """One tile z [U, R, C] into each thread's best z, sum of 2^u, of 2^(u / T), of u 2^u (all [R])."""
    best, s, s_t, moment = state
    new = tl.maximum(best, tl.max(tl.max(z, 2), 0))
    gap = tl.maximum((best - new) * c, FAR)
    u = z * c - (new * c)[None, :, None]
    e = tl.exp2(u)
    shrink = tl.exp2(gap)
    moment = (moment + gap * s) * shrink + _over_thread(e * tl.maximum(u, FAR))
    s = s * shrink + _over_thread(e)
    if TWO:
        s_t = s_t * tl.exp2(gap * inv_t) + _over_thread(tl.exp2(u * inv_t))
    return new, s, s_t, moment


@triton.jit
def stream_rest(
    x,
    V,
    scale,
    cap,
    c,
    inv_t,
    U: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    TWO: tl.constexpr,
    CAP: tl.constexpr,
    FILL: tl.constexpr,
):
    """The first stream: each thread's state of `_accumulate`, for sums_of_rest."""
    zero = tl.zeros((R,), tl.float32)
    state = (zero + NONE, zero, zero, zero)
    large = (V // (U * R * C)) * (U * R * C)
    whole = (V // (R * C)) * (R * C)
    offsets = _tile(U, R, C)
    for start in range(0, large, U * R * C):
        z = _load(x, start + offsets, V, scale, cap, False, CAP, FILL, "evict_last")
        state = _accumulate(z, state, c, inv_t, TWO)
    offsets = _tile(1, R, C)
    for start in range(large, whole, R * C):
        z = _load(x, start + offsets, V, scale, cap, False, CAP, FILL, "evict_last")
        state = _accumulate(z, state, c, inv_t, TWO)
    if whole < V:
        z = _load(x, whole + offsets, V, scale, cap, True, CAP, FILL, "evict_last")
        state = _accumulate(z, state, c, inv_t, TWO)
    return state


@triton.jit
def sums_of_rest(state, c, inv_t, TWO: tl.constexpr, FILL: tl.constexpr):
    """Scalars: the rest's best z, and relative to it sums of 2^u, of 2^(u / T) and of u 2^u; whether there is no rest.

    The sums are 0 without one. A rest of NaN alone is one: maxima do not see it, sums do.
    """
    best, s, s_t, moment = state
    top = tl.max(best, 0)
    gap = tl.maximum((best - top) * c, FAR)
    share = tl.exp2(gap)
    moment = (moment + gap * s) * share
    if TWO:
        total, moment, total_t = tl.reduce((s * share, moment, s_t * tl.exp2(gap * inv_t)), 0, add3)
    else:
        total, moment = tl.reduce((s * share, moment), 0, add2)
        total_t = total
    empty = (top <= 0.5 * FILL) & (total == total)  # nothing but columns that were taken out
    return top, tl.where(empty, 0.0, total), tl.where(empty, 0.0, total_t), tl.where(empty, 0.0, moment), empty


@triton.jit
def _write_block(
    x, offsets, V, row, scale, cap, MASKED: tl.constexpr, TWO: tl.constexpr, CAP: tl.constexpr, FILL: tl.constexpr
):
    """d loss / d raw over the logits of one tile: one or two softmaxes weight * 2^(z c - log2 of the sum)."""
    c_t, log_t, weight_t, c, log_1, weight_1 = row
    z = _load(x, offsets, V, scale, cap, MASKED, CAP, FILL, "evict_first")
    g = weight_t * tl.exp2(z * c_t - log_t)
    if TWO:
        g += weight_1 * tl.exp2(z * c - log_1)
    if CAP:
        g = g * slope_of(z, scale, cap, True)
    if MASKED:
        tl.store(x + offsets, g, mask=offsets < V, eviction_policy="evict_first")
    else:
        tl.store(x + offsets, g, eviction_policy="evict_first")


@triton.jit
def write_gradient(
    x,
    V,
    row,
    scale,
    cap,
    U: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    TWO: tl.constexpr,
    CAP: tl.constexpr,
    FILL: tl.constexpr,
    BACKWARDS: tl.constexpr,
):
    """The second stream, from the end of the row where BACKWARDS: what was read last is the likeliest to be cached."""
    large = (V // (U * R * C)) * (U * R * C)
    whole = (V // (R * C)) * (R * C)
    offsets = _tile(1, R, C)
    if whole < V:
        _write_block(x, whole + offsets, V, row, scale, cap, True, TWO, CAP, FILL)
    for start in range(large, whole, R * C):
        _write_block(x, start + offsets, V, row, scale, cap, False, TWO, CAP, FILL)
    offsets = _tile(U, R, C)
    for start in range(0, large, U * R * C):
        at = large - U * R * C - start if BACKWARDS else start
        _write_block(x, at + offsets, V, row, scale, cap, False, TWO, CAP, FILL)


@triton.jit
def clear_row(x, V, R: tl.constexpr, C: tl.constexpr):
    """0 over a row that is not read."""
    offsets = _tile(1, R, C)
    zero = tl.zeros((1, R, C), tl.float32)
    for start in range(0, V, R * C):
        tl.store(x + start + offsets, zero, mask=start + offsets < V)


@triton.jit
def copy_row(source, x, V, R: tl.constexpr, C: tl.constexpr):
    """One row into another, as it is."""
    offsets = _tile(1, R, C)
    whole = (V // (R * C)) * (R * C)
    for start in range(0, whole, R * C):
        tl.store(x + start + offsets, tl.load(source + start + offsets, eviction_policy="evict_first"))
    if whole < V:
        inside = whole + offsets < V
        value = tl.load(source + whole + offsets, mask=inside, other=0.0)
        tl.store(x + whole + offsets, value, mask=inside)
