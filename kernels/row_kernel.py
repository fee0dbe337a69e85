"""A slab of logits to losses, figures and gradient in ONE Triton kernel (launched from one_pass.py).

One program per row. It takes the kept ids and the label out of the row, streams the rest once for its sums, works out
all that has the size of the kept ids in registers, streams a second time for the gradient (from the L2 cache, where the
rows in flight fit it), and puts the special columns back. Formulas and their reference: row_terms.py (which see for why
each form is taken) and rows_torch.py; divergences_triton.py has the divergences.

Shapes: B rows of the slab, V logits each, BK lanes for the kept ids, tiles [R, C] of a row: R threads hold C neighbours
each, a load of 16 bytes. Arithmetic is float32 whatever the slab's dtype; only the gradient is rounded to it, once.

Numbers. `z` are logits after scale and cap, but the scale rides on the multiply-add before each exp2 (factor c) where
there is no cap. Logarithms to base 2 relative to the row's maximum are `u`; the rest's sums are those of an online
softmax (Milakov and Gimelshein, arXiv 1805.02867), kept by each thread for itself, so that the stream has no barrier; they
meet once, at the end of the row. What was taken out of the stream holds FILL there, whose exponential is exactly 0: the
mass of the rest is a sum of what is there, not `1 - sum q`. FILL is a number that every dtype holds exactly. Absent
buckets are NONE, not -inf: differences stay finite.

Safety. Offsets of rows are 64 bits wide; ids and labels outside 0 .. V - 1 are never turned into an address and make the
loss NaN; a row of weight 0 is not read. NaN logits give a NaN loss: maxima skip NaN, sums do not.
"""

import triton
import triton.language as tl

from potstill.kernels.divergences_triton import NONE, exp, log

_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)
# A gap to the maximum, in base 2, beyond which all is 0; finite, so that 0 times it is 0.
_FAR = tl.constexpr(-1e5)


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
def _slope(z, scale, cap, CAP: tl.constexpr):
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
def _log2_add(a, b):
    """log2(2^a + 2^b) (scalars), NONE where both are."""
    top = tl.maximum(a, b)
    return top + tl.log2(tl.exp2(a - top) + tl.exp2(b - top))


@triton.jit
def _special(x, at, inside, scale, cap, CAP: tl.constexpr):
    """z at the columns `at` where `inside`, NONE elsewhere and for -inf."""
    raw = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    z = _logit(raw, scale, cap, CAP)
    return tl.where(inside & (z >= NONE), z, tl.where(inside & (z != z), z, NONE))


# Several sums or maxima over one axis cost one exchange between the warps, not one each.
@triton.jit
def _add2(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add3(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _add4(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _add_and_tops(code, z, p, code_too, z_too, p_too):
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
    gap = tl.maximum((best - new) * c, _FAR)
    u = z * c - (new * c)[None, :, None]
    e = tl.exp2(u)
    shrink = tl.exp2(gap)
    moment = (moment + gap * s) * shrink + _over_thread(e * tl.maximum(u, _FAR))
    s = s * shrink + _over_thread(e)
    if TWO:
        s_t = s_t * tl.exp2(gap * inv_t) + _over_thread(tl.exp2(u * inv_t))
    return new, s, s_t, moment


@triton.jit
def _sums_of_rest(
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
    """The first stream. Scalars: the rest's best z, and relative to it sums of 2^u, of 2^(u / T) and of u 2^u; whether
    there is no rest (the sums are 0 then)."""
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
    best, s, s_t, moment = state
    top = tl.max(best, 0)
    empty = top <= 0.5 * FILL  # nothing but columns that were taken out
    gap = tl.maximum((best - top) * c, _FAR)
    share = tl.exp2(gap)
    moment = (moment + gap * s) * share
    if TWO:
        total, moment, total_t = tl.reduce((s * share, moment, s_t * tl.exp2(gap * inv_t)), 0, _add3)
        total_t = tl.where(empty, 0.0, total_t)
    else:
        total, moment = tl.reduce((s * share, moment), 0, _add2)
        total_t = total
    total = tl.where(empty, 0.0, total)
    moment_sum = tl.where(empty, 0.0, moment)
    return top, total, total_t, moment_sum, empty


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
        g = g * _slope(z, scale, cap, True)
    if MASKED:
        tl.store(x + offsets, g, mask=offsets < V, eviction_policy="evict_first")
    else:
        tl.store(x + offsets, g, eviction_policy="evict_first")


@triton.jit
def _write_gradient(
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
def _clear(x, V, R: tl.constexpr, C: tl.constexpr):
    """0 over a row that is not read."""
    offsets = _tile(1, R, C)
    zero = tl.zeros((1, R, C), tl.float32)
    for start in range(0, V, R * C):
        tl.store(x + start + offsets, zero, mask=start + offsets < V)


@triton.jit
def _copy(source, x, V, R: tl.constexpr, C: tl.constexpr):
    """One row into another, as it is."""
    offsets = _tile(1, R, C)
    whole = (V // (R * C)) * (R * C)
    for start in range(0, whole, R * C):
        tl.store(x + start + offsets, tl.load(source + start + offsets, eviction_policy="evict_first"))
    if whole < V:
        inside = whole + offsets < V
        value = tl.load(source + whole + offsets, mask=inside, other=0.0)
        tl.store(x + whole + offsets, value, mask=inside)


@triton.jit
def _log_sum(log_values):
    """log sum exp of [BK]; 0 where all are NONE, as the torch twin has it."""
    top = tl.max(log_values, 0)
    total = top + log(tl.sum(exp(log_values - top), 0))
    return tl.where(top <= 0.5 * NONE, 0.0, total)


@triton.jit
def _log1mexp(x):
    """log(1 - e^x) of a scalar x <= 0; near 0 by a series, as 1 - e^x cancels there."""
    x = tl.where(x > 0.0, 0.0, x)
    y = tl.where(x > -_LN2, x, 0.0)
    series = 1.0 + y / 9.0
    for n in tl.static_range(7):
        series = 1.0 + y * series / (8.0 - n)
    return tl.where(x > -_LN2, log(-y * series), log(1.0 - exp(x)))


@triton.jit
def _not_below_none(x):
    """x, -inf as NONE; NaN passes."""
    return tl.where(x < NONE, NONE, x)


@triton.jit
def _entries(values, kept, top, temperature, KIND: tl.constexpr, TEMPERED: tl.constexpr):
    """What is there of the teacher's entries before any sum over them, [BK]: draws, or logarithms at the teacher's
    temperature with NONE for none; and the largest. values [BK] as KIND says; top: the largest of them (scalar)."""
    if KIND == "counts":
        return tl.where(kept, values, 0.0), 0.0
    else:
        log_p = tl.where(kept, _not_below_none(values), NONE)
        if TEMPERED:
            # The shift comes first: near T = 0 a sum of the quotients could not tell one largest entry from two.
            log_p = tl.where(kept, tl.maximum(log_p - top, NONE * temperature) / temperature, NONE)
            top = 0.0
        return log_p, top


@triton.jit
def _teacher(
    entries, kept, top, total, tail, num_draws, KIND: tl.constexpr, MODE: tl.constexpr, TEMPERED: tl.constexpr
):
    """Logarithms of the teacher's mass on its entries [BK] and of the rest; twin of row_terms._teacher_buckets.

    entries [BK], top: of `_entries`; total: sum of the draws, or of exp(entries - top); tail: log of the mass outside.
    """
    rest = tl.full((), NONE, tl.float32)
    if KIND == "counts":
        return log(entries / tl.maximum(tl.where(num_draws < 0.0, total, num_draws), 1.0)), rest
    else:
        total = tl.where(top <= 0.5 * NONE, 0.0, top + log(total))
        norm = 0.0
        if MODE == "renorm" or MODE == "support":
            norm = total
        elif KIND == "logprobs":
            if TEMPERED:
                norm = total - _log1mexp(tail)
                rest = rest if MODE == "raw" else tail
            elif MODE != "raw":
                # Stored values and tail are each rounded to a grid, so the k + 1 buckets sum to 1 only nearly.
                larger = tl.maximum(total, tail)
                norm = larger + log(exp(total - larger) + exp(tail - larger))
                rest = _not_below_none(tail - norm)
        return tl.where(kept, _not_below_none(entries - norm), NONE), rest


@triton.jit
def _kd_terms(
    log_p,
    rest_p,
    hit,
    own,
    kept,
    u,
    label_u,
    rest_u,
    log_total,
    kept_q,
    option,
    DIVERGENCE: tl.constexpr,
    MODE: tl.constexpr,
    DRAWS: tl.constexpr,
):
    """Twin of row_terms._kd_terms. log_p [BK], rest_p: of the teacher; u [BK], label_u, rest_u: log2 of what the student
    has on the entries, on a label that is none of them (`own`) and on the rest without it; log_total: of all; kept_q: the
    student's mass on the entries.

    Returns the divergence, its gradient by z / T [BK] and at the own label, the weight of the softmax of the rest, and
    the masses of student and teacher on the kept buckets.
    """
    label_p = tl.full((), NONE, tl.float32)
    label_q = label_p
    outside = rest_u
    if MODE == "label":
        top = tl.maximum(log_p, rest_p)
        log_p = tl.where(hit, top + log(exp(log_p - top) + exp(rest_p - top)), log_p)
        label_p = tl.where(own, rest_p, NONE)
        label_q = tl.where(own, (label_u - log_total) * _LN2, NONE)
        rest_p = tl.full((), NONE, tl.float32)
    else:
        outside = _log2_add(rest_u, label_u)
    log_q = tl.where(kept, (u - log_total) * _LN2, NONE)
    rest_q = (outside - log_total) * _LN2
    q = exp(log_q)
    student_mass = kept_q + exp(label_q)
    bucket_q = log_q
    bucket_rest = rest_q
    if MODE == "support":
        bucket_q = tl.where(kept, log_q - _log_sum(log_q), NONE)
    if MODE == "support" or MODE == "raw" or DRAWS:
        bucket_rest = tl.full((), NONE, tl.float32)  # no rest bucket
    count = tl.sum((log_p > 0.5 * NONE).to(tl.float32), 0) + tl.where(label_p > 0.5 * NONE, 1.0, 0.0)
    inverse = 1.0 / tl.maximum(count, 1.0)
    term, a = DIVERGENCE(log_p, bucket_q, inverse, option)
    rest_term, a_rest = DIVERGENCE(rest_p, bucket_rest, inverse * 0.0, option)
    value, a_kept, kept_mass = tl.reduce((term, a, exp(log_p)), 0, _add3)
    value += rest_term
    kept_mass += exp(label_p)
    if MODE == "support":
        # Chain through q~ = q / Q_S: d log q~_i / d log q_j = [i = j] - q~_j.
        a = a - exp(bucket_q) * a_kept
        a_kept = tl.sum(a, 0)
    label_grad = tl.full((), 0.0, tl.float32)
    if MODE == "label":
        label_term, label_a = DIVERGENCE(label_p, label_q, inverse, option)
        value += label_term
        a_kept += label_a
        label_grad = label_a - (a_kept + a_rest) * exp(label_q)
    # The whole rest's gradient a_r - A q_r, with Q_S = 1 - q_r and A less a_r: row_terms.py says why.
    rest = a_rest * student_mass - a_kept * exp(rest_q)
    if MODE != "label":
        label_grad = rest * tl.exp2(label_u - outside)
    return value, a - (a_kept + a_rest) * q, label_grad, rest * tl.exp2(rest_u - outside), student_mass, kept_mass


@triton.jit
def _take_out(
    x, read, start, count, id_ptr, value_ptr, label, V, scale, cap,
    BK: tl.constexpr, R: tl.constexpr, C: tl.constexpr, CAP: tl.constexpr, FILL: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """The special columns, out of the row: z at them, and FILL in the slab's row x in their place.

    read: the row that holds the logits, x itself without SOURCE. Returns ids [BK], which lanes are entries within V, which
    of them is the label, z [BK]; scalars: whether the label is none of them, whether an id or the label is outside, z at
    the label and at the first entry, the largest z, the largest of what the teacher says.
    """
    lane = tl.arange(0, BK)
    entry = lane < count
    has_label = (label >= 0) & (label < V)
    label_z = _special(read, label, has_label, scale, cap, CAP)
    if id_ptr is None:
        ids = tl.zeros((BK,), tl.int32)
        kept, hit, z = entry, entry, tl.full((BK,), NONE, tl.float32)
        own, bad = has_label, label >= V
        first_z, top_z, top_p = NONE, NONE, NONE
    else:
        ids = tl.load(id_ptr + start + lane, mask=entry, other=0)
        values = tl.load(value_ptr + start + lane, mask=entry, other=NONE).to(tl.float32)
        kept = entry & (ids >= 0) & (ids < V)
        hit = kept & (ids == label)
        z = _special(read, ids, kept, scale, cap, CAP)
        # Lanes outside count 65536 each, and there are fewer lanes than that.
        code = hit.to(tl.int32) + (entry & (kept == 0)).to(tl.int32) * 65536
        code, top_z, top_p = tl.reduce((code, z, values), 0, _add_and_tops)
        own = has_label & (code % 65536 == 0)
        bad = (code >= 65536) | (label >= V)
        first = tl.load(id_ptr + start, mask=count > 0, other=-1)
        first_z = _special(read, first, (first >= 0) & (first < V), scale, cap, CAP)
    if SOURCE:
        _copy(read, x, V, R, C)
    # All values are in registers before the columns leave the stream, and all are out before it starts. Several threads
    # may hold the same lane, and others stream over these columns: no step may overtake the one before.
    tl.debug_barrier()
    tl.store(x + ids, FILL, mask=kept)
    tl.store(x + label, FILL, mask=own)
    tl.debug_barrier()
    return ids, kept, hit, z, own, bad, label_z, first_z, top_z, top_p


@triton.jit
def _weigh(
    kd, kd_grad, kd_label_grad, kd_rest, student_mass, kept_mass, q, label_q, rest_q, lse, entropy, ce, hit,
    has_target, has_label, agrees, correct, weight, kd_weight, factor_ptr, student_t, out, stride_out,
):  # fmt: skip
    """Stores loss and figures of the row; twin of row_terms.row_terms.

    Returns d loss / dz at the entries [BK] and at a label that is none of them, and the weights of the two softmaxes of
    the rest, at T and at 1.
    """
    alpha = tl.load(factor_ptr)
    ce_weight = tl.load(factor_ptr + 1)
    z_loss = tl.load(factor_ptr + 2)
    kd = tl.where(has_target, kd, 0.0)
    amount = tl.where(has_target, weight * kd_weight, 0.0)
    coefficient = amount * (alpha * student_t)
    counts = coefficient != 0.0  # with alpha 0 not even an infinite divergence counts
    loss = tl.where(counts, coefficient * student_t * kd, 0.0) + weight * (ce_weight * ce + z_loss * lse * lse)
    target_weight = tl.where(has_target, weight, 0.0)
    label_weight = tl.where(has_label, weight, 0.0)
    tl.store(out, loss)
    tl.store(out + stride_out, amount * kd)
    tl.store(out + 2 * stride_out, weight * ce)
    tl.store(out + 3 * stride_out, weight * lse * lse)
    tl.store(out + 4 * stride_out, weight)
    tl.store(out + 5 * stride_out, amount)
    tl.store(out + 6 * stride_out, tl.where(has_target, weight * kept_mass, 0.0))
    tl.store(out + 7 * stride_out, tl.where(has_target, weight * student_mass, 0.0))
    tl.store(out + 8 * stride_out, tl.where(agrees, weight, 0.0))
    tl.store(out + 9 * stride_out, tl.where(correct, weight, 0.0))
    tl.store(out + 10 * stride_out, weight * entropy)
    tl.store(out + 11 * stride_out, target_weight)
    tl.store(out + 12 * stride_out, label_weight)
    tl.store(out + 13 * stride_out, has_target.to(tl.float32))
    tl.store(out + 14 * stride_out, has_label.to(tl.float32))
    gamma = label_weight * ce_weight + weight * 2.0 * z_loss * lse
    grad = tl.where(counts, coefficient * kd_grad, 0.0) + gamma * q - tl.where(hit, weight * ce_weight, 0.0)
    label_grad = tl.where(counts, coefficient * kd_label_grad, 0.0) + gamma * label_q - weight * ce_weight
    return grad, label_grad, tl.where(counts, coefficient * kd_rest, 0.0), gamma * rest_q


@triton.jit
def _row(
    x, read, row, token, weight, offset_ptr, id_ptr, value_ptr, tail_ptr, label_ptr, kd_weight_ptr, factor_ptr,
    upstream_ptr, out, stride_out, V, scale, cap, student_t, teacher_t, num_draws, option,
    BK: tl.constexpr, U: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BACKWARDS: tl.constexpr,
    KIND: tl.constexpr, MODE: tl.constexpr, DIVERGENCE: tl.constexpr, TEMPERED: tl.constexpr, TWO: tl.constexpr,
    PLAIN: tl.constexpr, CAP: tl.constexpr, FILL: tl.constexpr, GRADIENT: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """One row of a weight that is not 0; arguments as in row_kernel."""
    any_label = tl.load(label_ptr + token)
    has_label = (any_label >= 0) & (any_label < V)
    label = tl.where(any_label < V, any_label, V).to(tl.int32)
    start = tl.load(offset_ptr + token) if offset_ptr is not None else 0
    count = (tl.load(offset_ptr + token + 1) - start).to(tl.int32) if offset_ptr is not None else 0
    ids, kept, hit, z, own, bad, label_z, first_z, top_z, top_p = _take_out(
        x, read, start, count, id_ptr, value_ptr, label, V, scale, cap, BK, R, C, CAP, FILL, SOURCE
    )
    c = _LOG2E if CAP else scale * _LOG2E
    inv_t = 1.0 / student_t
    rest_z, rest_sum, rest_sum_t, rest_moment, empty = _sums_of_rest(
        x, V, scale, cap, c, inv_t, U, R, C, TWO, CAP, FILL
    )
    # Base 2, relative to the best of all: at the entries, at a label that is none of them, the best of the rest.
    best = tl.maximum(rest_z, top_z)
    best = tl.where(own, tl.maximum(best, label_z), best)
    u = tl.where(kept, z * c - best * c, NONE)
    label_u = tl.where(own, label_z * c - best * c, NONE)
    gap = tl.where(empty, NONE, (rest_z - best) * c)
    e, label_e = tl.exp2(u), tl.exp2(label_u)
    u_t, label_u_t, gap_t = u, label_u, gap
    if TWO:
        u_t, label_u_t, gap_t = (
            tl.maximum(u * inv_t, NONE),
            tl.maximum(label_u * inv_t, NONE),
            tl.maximum(gap * inv_t, NONE),
        )
    e_t = tl.exp2(u_t)
    entries = e
    if KIND != "none":
        values = tl.load(value_ptr + start + tl.arange(0, BK), mask=kept, other=NONE).to(tl.float32)
        entries, top_p = _entries(values, kept, _not_below_none(top_p), teacher_t, KIND, TEMPERED)
        amounts = entries if KIND == "counts" else exp(entries - top_p)
        kept_sum, moment, kept_sum_t, kept_p = tl.reduce((e, e * u, e_t, amounts), 0, _add4)
    else:
        kept_sum, moment, kept_sum_t, kept_p = 0.0, 0.0, 0.0, 0.0
    near = tl.maximum(gap, _FAR)
    rest = tl.where(bad, float("nan"), rest_sum * tl.exp2(near))
    total = rest + kept_sum + label_e
    log_total = tl.log2(total)
    moment += (rest_moment + near * rest_sum) * tl.exp2(near) + label_e * label_u
    entropy = (log_total - moment / total) * _LN2
    ce = tl.where(has_label, (log_total - (label_z * c - best * c)) * _LN2, 0.0)
    log_rest = tl.log2(tl.where(empty, 1.0, rest_sum))
    log_rest_t, total_t = log_rest, total
    if TWO:
        log_rest_t = tl.log2(tl.where(empty, 1.0, rest_sum_t))
        total_t = tl.where(bad, float("nan"), rest_sum_t * tl.exp2(gap_t) + kept_sum_t + tl.exp2(label_u_t))
    if KIND != "none":
        has_target = count > 0
        if MODE == "label":
            has_target = has_target & has_label
        tail = _not_below_none(tl.load(tail_ptr + token)) if tail_ptr is not None else NONE
        log_p, rest_p = _teacher(entries, kept, top_p, kept_p, tail, num_draws, KIND, MODE, TEMPERED)
        kd, kd_grad, kd_label_grad, kd_rest, student_mass, kept_mass = _kd_terms(
            log_p, rest_p, hit, own, kept, u_t, label_u_t, gap_t + log_rest_t, tl.log2(total_t), kept_sum_t / total_t,
            option, DIVERGENCE, MODE, KIND == "counts" or KIND == "log_weights",
        )  # fmt: skip
    else:
        has_target = weight != weight
        kd, kd_label_grad, kd_rest, student_mass, kept_mass = 0.0, 0.0, 0.0, 0.0, 0.0
        kd_grad = tl.zeros((BK,), tl.float32)
    grad, label_grad, weight_t, weight_1 = _weigh(
        kd, kd_grad, kd_label_grad, kd_rest, student_mass, kept_mass, e / total, label_e / total, rest / total,
        (best * c + log_total) * _LN2, entropy, ce, hit, has_target, has_label, has_target & (first_z >= best),
        has_label & (label_z >= best), weight, tl.load(kd_weight_ptr + token), factor_ptr, student_t, out, stride_out,
    )  # fmt: skip
    if GRADIENT:
        upstream = tl.load(upstream_ptr) if upstream_ptr is not None else 1.0
        slope = upstream if CAP else upstream * scale
        log_1 = tl.where(empty, 0.0, rest_z * c + log_rest)
        log_t = tl.where(empty, 0.0, rest_z * c * inv_t + log_rest_t)
        if TWO:
            dense = (c * inv_t, log_t, weight_t * slope, c, log_1, weight_1 * slope)
        else:
            dense = (c, log_1, (weight_t + weight_1) * slope, c, log_1, 0.0)
        _write_gradient(x, V, dense, scale, cap, U, R, C, TWO and PLAIN, CAP, FILL, BACKWARDS)
        grad = grad * upstream * _slope(z, scale, cap, CAP)
        label_grad = label_grad * upstream * _slope(label_z, scale, cap, CAP)
        tl.debug_barrier()  # the stream of other threads wrote these columns too
        tl.store(x + ids, grad, mask=kept)
        tl.store(x + label, label_grad, mask=own)


@triton.jit(do_not_specialize=["first", "stride_out"])
def row_kernel(
    x_ptr,  # [B, V] raw logits, row stride stride_x; d loss / d raw when done with GRADIENT, else spoilt
    source_ptr,  # [N, V] raw logits of all tokens, row stride stride_source, or None: they are in x
    token_ptr,  # int64 [B] which of the N tokens, or None: first + row
    offset_ptr,  # int64 [N + 1], or None without targets
    id_ptr,  # int32 [E], or None
    value_ptr,  # [E] log-probabilities, counts or log weights as KIND says, or None
    tail_ptr,  # float32 [N] log of the mass outside at the teacher's temperature, or None where MODE needs none
    label_ptr,  # int64 [N]
    weight_ptr,  # float32 [N]
    kd_weight_ptr,  # float32 [N]
    factor_ptr,  # float32 [3] alpha, ce_weight, z_loss
    upstream_ptr,  # float32 [] times the gradient, or None
    out_ptr,  # float32 [15, B], row stride stride_out: loss, then the figures of LossSums
    stride_x, stride_source, stride_out, first, V,
    scale,  # of the logits, > 0
    cap,  # of the logits, > 0; 1 without CAP
    student_t, teacher_t,  # temperatures
    num_draws,  # float: of each token, -1 for the sum of its counts
    option,  # the divergence's constant
    BK: tl.constexpr,  # lanes for the entries, a power of 2
    U: tl.constexpr, R: tl.constexpr, C: tl.constexpr,  # a tile: R threads with U times C neighbours each
    BACKWARDS: tl.constexpr,  # the second stream's direction
    KIND: tl.constexpr,  # "none", "logprobs", "counts", "log_weights"
    MODE: tl.constexpr,  # of missing mass
    DIVERGENCE: tl.constexpr,  # one of divergences_triton.TWINS
    TEMPERED: tl.constexpr, TWO: tl.constexpr,  # whether the teacher's, the student's temperature is not 1
    PLAIN: tl.constexpr,  # whether CE or z-loss count: a second softmax in the gradient, with TWO
    CAP: tl.constexpr, FILL: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """One row; a row of weight 0 gets zeros and is not read."""
    row = tl.program_id(0).to(tl.int64)
    token = first + row if token_ptr is None else tl.load(token_ptr + row)
    x = x_ptr + row * stride_x
    weight = tl.load(weight_ptr + token)
    if weight == 0.0:
        for figure in tl.static_range(15):
            tl.store(out_ptr + row + figure * stride_out, 0.0)
        if GRADIENT:
            _clear(x, V, R, C)
    else:
        read = x if source_ptr is None else source_ptr + token * stride_source
        _row(
            x, read, row, token, weight, offset_ptr, id_ptr, value_ptr, tail_ptr, label_ptr, kd_weight_ptr, factor_ptr,
            upstream_ptr, out_ptr + row, stride_out, V, scale, cap, student_t, teacher_t, num_draws, option,
            BK, U, R, C, BACKWARDS, KIND, MODE, DIVERGENCE, TEMPERED, TWO, PLAIN, CAP, FILL, GRADIENT,
            source_ptr is not None,
        )  # fmt: skip
