"""A slab of logits to losses, figures and gradient in ONE Triton kernel (launched from one_pass.py).

One program per row. It takes the kept ids and the label out of the row, streams the rest once for its sums, works out
all that has the size of the kept ids in registers, streams a second time for the gradient (from the L2 cache, where the
rows in flight fit it), and puts the special columns back. Formulas and their reference: row_terms.py (which see for why
each form is taken) and rows_torch.py; divergences_triton.py has the divergences.

Shapes: B rows of the slab, V logits each, BK lanes for the kept ids, tiles [U, R, C] of a row. The streams are in
row_streams.py, the buckets in row_buckets.py. Arithmetic is float32 whatever the slab's dtype; only the gradient is
rounded to it, once.

Numbers. `z` are logits after scale and cap, but the scale rides on the multiply-add before each exp2 (factor c) where
there is no cap. Logarithms to base 2 relative to the row's maximum are `u`; the rest's sums are those of an online
softmax (Milakov and Gimelshein, arXiv 1805.02867), kept by each thread for itself, so that the stream has no barrier;
they meet once, at the end of the row. What was taken out of the stream holds FILL there, whose exponential is 0: the
mass of the rest is a sum of what is there, not `1 - sum q`. FILL is a number that the dtype holds exactly. Absent
buckets are NONE, not -inf: differences stay finite.

Safety. Offsets of rows are 64 bits wide; ids and labels outside 0 .. V - 1 are never turned into an address and make
the loss NaN; a row of weight 0 is not read. NaN logits give a NaN loss: maxima skip NaN, sums do not.
"""

import triton
import triton.language as tl

from potstill.kernels.divergences_triton import NONE, exp
from potstill.kernels.row_buckets import entries_of, kd_terms, not_below_none, teacher_buckets
from potstill.kernels.row_streams import (
    FAR,
    add4,
    add_and_tops,
    clear_row,
    copy_row,
    slope_of,
    special,
    stream_rest,
    sums_of_rest,
    write_gradient,
)

_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _take_out(
    x, read, start, count, id_ptr, value_ptr, label, V, scale, cap,
    BK: tl.constexpr, R: tl.constexpr, C: tl.constexpr, CAP: tl.constexpr, FILL: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """The special columns, out of the row: z at them, and FILL in the slab's row x in their place.

    read: the row that holds the logits, x itself without SOURCE. Returns ids [BK], which lanes are entries within V,
    which of them is the label, z [BK]; scalars: whether the label is none of them, whether an id or the label is
    outside, z at the label and at the first entry, the largest z, the largest of what the teacher says.
    """
    lane = tl.arange(0, BK)
    entry = lane < count
    has_label = (label >= 0) & (label < V)
    label_z = special(read, label, has_label, scale, cap, CAP)
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
        z = special(read, ids, kept, scale, cap, CAP)
        # Lanes outside count 65536 each, and there are fewer lanes than that.
        code = hit.to(tl.int32) + (entry & (kept == 0)).to(tl.int32) * 65536
        code, top_z, top_p = tl.reduce((code, z, values), 0, add_and_tops)
        own = has_label & (code % 65536 == 0)
        bad = (code >= 65536) | (label >= V)
        first = tl.load(id_ptr + start, mask=count > 0, other=-1)
        first_z = special(read, first, (first >= 0) & (first < V), scale, cap, CAP)
    if SOURCE:
        copy_row(read, x, V, R, C)
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
    has_target, has_label, agrees, correct, weight, kd_weight, factors, student_t, out, stride_out,
):  # fmt: skip
    """Stores loss and figures of the row; twin of row_terms.row_terms.

    Returns d loss / dz at the entries [BK] and at a label that is none of them, and the weights of the two softmaxes of
    the rest, at T and at 1.
    """
    alpha, ce_weight, z_loss, off_weight = factors
    has_kd = has_target & (kd_weight != 0.0)
    ce_weight = tl.where(has_kd, ce_weight, ce_weight + off_weight)
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
def _relative(z, kept, label_z, own, top_z, rest, c):
    """The best z of all; and in base 2, relative to it, at the entries, at a label that is none of them, and the rest's
    best (NONE without a rest)."""
    rest_z, _, _, _, empty = rest
    best = tl.maximum(rest_z, top_z)
    best = tl.where(own, tl.maximum(best, label_z), best)
    u = tl.where(kept, z * c - best * c, NONE)
    label_u = tl.where(own, label_z * c - best * c, NONE)
    return best, u, label_u, tl.where(empty, NONE, (rest_z - best) * c)


@triton.jit
def _tempered(u, label_u, gap, inv_t, TWO: tl.constexpr):
    """The same of z / T."""
    if TWO:
        u = tl.maximum(u * inv_t, NONE)
        label_u = tl.maximum(label_u * inv_t, NONE)
        gap = tl.maximum(gap * inv_t, NONE)
    return u, label_u, gap


@triton.jit
def _sums_of_lanes(u, u_t, amounts, KIND: tl.constexpr):
    """Sums over the entries of 2^u, u 2^u, 2^(u at T) and of the teacher's amounts."""
    e = tl.exp2(u)
    if KIND == "none":
        return 0.0, 0.0, 0.0, 0.0
    else:
        return tl.reduce((e, e * u, tl.exp2(u_t), amounts), 0, add4)


@triton.jit
def _totals(u, label_u, gap, rest, kept_sum, kept_moment, bad):
    """At T = 1: the share of each entry [BK], of a label that is none of them, of the rest; log2 of the total; entropy.

    All NaN where an id or the label is `bad`.
    """
    _, rest_sum, _, rest_moment, _ = rest
    near = tl.maximum(gap, FAR)
    label_e = tl.exp2(label_u)
    rest_e = tl.where(bad, float("nan"), rest_sum * tl.exp2(near))
    total = rest_e + kept_sum + label_e
    moment = kept_moment + (rest_moment + near * rest_sum) * tl.exp2(near) + label_e * label_u
    log_total = tl.log2(total)
    entropy = (log_total - moment / total) * _LN2
    return tl.exp2(u) / total, label_e / total, rest_e / total, log_total, entropy


@triton.jit
def _dense(weight_t, weight_1, rest, c, inv_t, slope, TWO: tl.constexpr):
    """Factor, log2 of the sum and weight of each softmax of the rest, at T and at 1, for write_gradient."""
    rest_z, rest_sum, rest_sum_t, _, empty = rest
    log_1 = tl.where(empty, 0.0, rest_z * c + tl.log2(tl.where(empty, 1.0, rest_sum)))
    if TWO:
        log_t = tl.where(empty, 0.0, rest_z * c * inv_t + tl.log2(tl.where(empty, 1.0, rest_sum_t)))
        return c * inv_t, log_t, weight_t * slope, c, log_1, weight_1 * slope
    else:
        return c, log_1, (weight_t + weight_1) * slope, c, log_1, 0.0


@triton.jit
def _row(
    x, read, token, weight, any_label, start, count, id_ptr, value_ptr, tail_ptr, kd_weight_ptr, factor_ptr,
    upstream_ptr, out, stride_out, V, scale, cap, student_t, teacher_t, num_draws, option,
    BK: tl.constexpr, U: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BACKWARDS: tl.constexpr,
    KIND: tl.constexpr, MODE: tl.constexpr, DIVERGENCE: tl.constexpr, TEMPERED: tl.constexpr, TWO: tl.constexpr,
    PLAIN: tl.constexpr, CAP: tl.constexpr, FILL: tl.constexpr, GRADIENT: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """One row of a weight that is not 0; arguments as in row_kernel."""
    has_label = (any_label >= 0) & (any_label < V)
    label = tl.where(any_label < V, any_label, V).to(tl.int32)
    ids, kept, hit, z, own, bad, label_z, first_z, top_z, top_p = _take_out(
        x, read, start, count, id_ptr, value_ptr, label, V, scale, cap, BK, R, C, CAP, FILL, SOURCE
    )
    c = _LOG2E if CAP else scale * _LOG2E
    inv_t = 1.0 / student_t
    state = stream_rest(x, V, scale, cap, c, inv_t, U, R, C, TWO, CAP, FILL)
    # Not before the stream, which needs the registers, and not where they are needed, which would wait for each.
    kd_weight = tl.load(kd_weight_ptr + token)
    factors = tl.load(factor_ptr), tl.load(factor_ptr + 1), tl.load(factor_ptr + 2), tl.load(factor_ptr + 3)
    upstream = tl.load(upstream_ptr) if upstream_ptr is not None else 1.0
    tail = not_below_none(tl.load(tail_ptr + token)) if tail_ptr is not None else NONE
    values = z
    if KIND != "none":
        values = tl.load(value_ptr + start + tl.arange(0, BK), mask=kept, other=NONE).to(tl.float32)
    rest = sums_of_rest(state, c, inv_t, TWO, FILL)
    best, u, label_u, gap = _relative(z, kept, label_z, own, top_z, rest, c)
    u_t, label_u_t, gap_t = _tempered(u, label_u, gap, inv_t, TWO)
    has_target = count > 0
    if MODE == "label":
        has_target = has_target & has_label
    entries, amounts = u, u
    if KIND != "none":
        entries, top_p = entries_of(values, kept, not_below_none(top_p), teacher_t, KIND, TEMPERED)
        amounts = entries if KIND == "counts" else exp(entries - top_p)
    kept_sum, kept_moment, kept_sum_t, kept_p = _sums_of_lanes(u, u_t, amounts, KIND)
    q, label_q, rest_q, log_total, entropy = _totals(u, label_u, gap, rest, kept_sum, kept_moment, bad)
    ce = tl.where(has_label, (log_total - (label_z * c - best * c)) * _LN2, 0.0)
    kd, kd_label_grad, kd_rest, student_mass, kept_mass = 0.0, 0.0, 0.0, 0.0, 0.0
    kd_grad = tl.zeros((BK,), tl.float32)
    if KIND != "none":
        log_p, rest_p = teacher_buckets(entries, kept, top_p, kept_p, tail, num_draws, KIND, MODE, TEMPERED)
        sum_t = rest[2]
        total_t = tl.where(bad, float("nan"), sum_t * tl.exp2(gap_t) + kept_sum_t + tl.exp2(label_u_t))
        rest_u_t = gap_t + tl.log2(tl.where(rest[4], 1.0, sum_t))
        kd, kd_grad, kd_label_grad, kd_rest, student_mass, kept_mass = kd_terms(
            log_p, rest_p, hit, own, kept, u_t, label_u_t, rest_u_t, tl.log2(total_t), kept_sum_t / total_t,
            option, DIVERGENCE, MODE, KIND == "counts" or KIND == "log_weights",
        )  # fmt: skip
    grad, label_grad, weight_t, weight_1 = _weigh(
        kd, kd_grad, kd_label_grad, kd_rest, student_mass, kept_mass, q, label_q, rest_q,
        (best * c + log_total) * _LN2, entropy, ce, hit, has_target, has_label, has_target & (first_z >= best),
        has_label & (label_z >= best), weight, kd_weight, factors, student_t, out, stride_out,
    )  # fmt: skip
    if GRADIENT:
        dense = _dense(weight_t, weight_1, rest, c, inv_t, upstream if CAP else upstream * scale, TWO)
        write_gradient(x, V, dense, scale, cap, U, R, C, TWO and PLAIN, CAP, FILL, BACKWARDS)
        tl.debug_barrier()  # the stream of other threads wrote these columns too
        tl.store(x + ids, grad * upstream * slope_of(z, scale, cap, CAP), mask=kept)
        tl.store(x + label, label_grad * upstream * slope_of(label_z, scale, cap, CAP), mask=own)


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
    factor_ptr,  # float32 [4] alpha, ce_weight, z_loss, off_weight
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
    PLAIN: tl.constexpr,  # whether CE or z-loss count for any row: a second softmax in the gradient, with TWO
    CAP: tl.constexpr, FILL: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """One row; a row of weight 0 gets zeros and is not read."""
    row = tl.program_id(0).to(tl.int64)
    token = first + row if token_ptr is None else tl.load(token_ptr + row)
    x = x_ptr + row * stride_x
    # Before the branch, so that all of these are on their way at once.
    weight = tl.load(weight_ptr + token)
    label = tl.load(label_ptr + token)
    start = tl.load(offset_ptr + token) if offset_ptr is not None else 0
    count = (tl.load(offset_ptr + token + 1) - start).to(tl.int32) if offset_ptr is not None else 0
    if weight == 0.0:
        for figure in tl.static_range(15):
            tl.store(out_ptr + row + figure * stride_out, 0.0)
        if GRADIENT:
            clear_row(x, V, R, C)
    else:
        read = x if source_ptr is None else source_ptr + token * stride_source
        _row(
            x, read, token, weight, label, start, count, id_ptr, value_ptr, tail_ptr, kd_weight_ptr, factor_ptr,
            upstream_ptr, out_ptr + row, stride_out, V, scale, cap, student_t, teacher_t, num_draws, option,
            BK, U, R, C, BACKWARDS, KIND, MODE, DIVERGENCE, TEMPERED, TWO, PLAIN, CAP, FILL, GRADIENT,
            source_ptr is not None,
        )  # fmt: skip
