"""What a row kernel does with the k + 1 buckets of a row: the teacher's, and the divergence with its gradient.

Twins of the functions of row_terms.py, which says why each form is taken; [BK] are the lanes of the entries. Absent
buckets are NONE (divergences_triton.py).
"""

import triton
import triton.language as tl

from potstill.kernels.divergences_triton import NONE, exp, log
from potstill.kernels.row_streams import add3

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _log2_add(a, b):
    """log2(2^a + 2^b) (scalars), NONE where both are."""
    top = tl.maximum(a, b)
    return top + tl.log2(tl.exp2(a - top) + tl.exp2(b - top))


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
def not_below_none(x):
    """x, -inf as NONE; NaN passes."""
    return tl.where(x < NONE, NONE, x)


@triton.jit
def entries_of(values, kept, top, temperature, KIND: tl.constexpr, TEMPERED: tl.constexpr):
    """What is there of the teacher's entries before any sum over them, [BK]: draws, or logarithms at the teacher's
    temperature with NONE for none; and the largest. values [BK] as KIND says; top: the largest of them (scalar)."""
    if KIND == "counts":
        return tl.where(kept, values, 0.0), 0.0
    else:
        log_p = tl.where(kept, not_below_none(values), NONE)
        if TEMPERED:
            # The shift comes first: near T = 0 a sum of the quotients could not tell one largest entry from two.
            log_p = tl.where(kept, tl.maximum(log_p - top, NONE * temperature) / temperature, NONE)
            top = 0.0
        return log_p, top


@triton.jit
def teacher_buckets(
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
                rest = not_below_none(tail - norm)
        return tl.where(kept, not_below_none(entries - norm), NONE), rest


@triton.jit
def kd_terms(
    log_p, rest_p, hit, own, kept, u, label_u, rest_u, log_total, kept_q, option,
    DIVERGENCE: tl.constexpr, MODE: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """Twin of row_terms._kd_terms. log_p [BK], rest_p: of the teacher; u [BK], label_u, rest_u: log2 of what the
    student has on the entries, on a label that is none of them (`own`) and on the rest without it; log_total: of all;
    kept_q: the student's mass on the entries.

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
    value, a_kept, kept_mass = tl.reduce((term, a, exp(log_p)), 0, add3)
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
