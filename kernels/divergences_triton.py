"""The divergences of divergences.py for one row inside a Triton kernel (row_kernel.py), and the table that names them.

Each twin takes natural logarithms of the teacher's and the student's share of some buckets (any shape), and returns the
buckets' terms of the divergence and their derivatives by log q, of the same shape:

    f(log_p, log_q, inverse_count, option) -> (term, a)

An absent bucket has NONE on both sides: finite, where the torch functions have -inf, so that no difference is NaN;
its exponential is 0. inverse_count: 1 / kept buckets, 0 for the rest bucket. option: the one constant (skew, beta or
floor).

A divergence that is missing here works all the same: it takes the two passes (one_pass.py says when). To add its twin:
such a function and an entry in TWINS; the tests pick it up from there.
"""

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

# A power of two: its products are exact, and where one is fused with a difference (a GPU rounds such a pair once, the
# interpreter twice) what cancels still cancels.
NONE = tl.constexpr(-(2.0**100))
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """e^x; exp2 lowers to one instruction, and the interpreter rounds it as a GPU does."""
    return tl.exp2(x * _LOG2E)


@triton.jit
def log(x):
    """Natural logarithm of x >= 0 (NaN passes); NONE for 0."""
    return tl.where(x == 0.0, NONE, tl.log2(tl.where(x == 0.0, 1.0, x)) * _LN2)


@triton.jit
def _log_of_sum(a, b):
    """log(e^a + e^b), NONE where both are."""
    top = tl.maximum(a, b)
    return top + log(exp(a - top) + exp(b - top))


@triton.jit
def _forward_kl(log_p, log_q, inverse_count, option):
    p = exp(log_p)
    return tl.where(p > 0, p * (log_p - log_q), 0.0), -p


@triton.jit
def _reverse_kl(log_p, log_q, inverse_count, option):
    q = exp(log_q)
    term = tl.where(q > 0, q * (log_q - tl.maximum(log_p, option)), 0.0)
    return term, term + q


@triton.jit
def _skew_forward(log_p, log_q, inverse_count, option):
    p = exp(log_p)
    log_m = _log_of_sum(log_p + log(option), log_q + log(1.0 - option))
    a = tl.where(p > 0, -(1.0 - option) * exp(log_p + log_q - log_m), 0.0)
    return tl.where(p > 0, p * (log_p - log_m), 0.0), a


@triton.jit
def _skew_reverse(log_p, log_q, inverse_count, option):
    q = exp(log_q)
    log_m = _log_of_sum(log_p + log(1.0 - option), log_q + log(option))
    term = tl.where(q > 0, q * (log_q - log_m), 0.0)
    return term, term + q - tl.where(q > 0, option * exp(2 * log_q - log_m), 0.0)


@triton.jit
def _jsd(log_p, log_q, inverse_count, option):
    p = exp(log_p)
    q = exp(log_q)
    log_m = _log_of_sum(log_p + log(option), log_q + log(1.0 - option))
    student = (1.0 - option) * tl.where(q > 0, q * (log_q - log_m), 0.0)
    return option * tl.where(p > 0, p * (log_p - log_m), 0.0) + student, student


@triton.jit
def _total_variation(log_p, log_q, inverse_count, option):
    p = exp(log_p)
    q = exp(log_q)
    sign = tl.where(q > p, 0.5, tl.where(q < p, -0.5, 0.0))
    return 0.5 * tl.abs(p - q), sign * q


@triton.jit
def _mse_logprobs(log_p, log_q, inverse_count, option):
    difference = tl.where(log_p > 0.5 * NONE, log_q - log_p, 0.0)
    share = difference * inverse_count  # first: 0 for the rest bucket, however large the difference
    return share * difference, 2 * share


@triton.jit
def _mse_probs(log_p, log_q, inverse_count, option):
    q = exp(log_q)
    difference = q - exp(log_p)
    return difference * difference, 2 * difference * q


@triton.jit
def _sampled(log_p, log_q, inverse_count, option):
    t = exp(log_p)
    return tl.where(t > 0, -t * log_q, 0.0), -t


# By the names of DIVERGENCES. Any: triton's types know no function of functions.
TWINS: Mapping[str, Any] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "skew_forward": _skew_forward,
    "skew_reverse": _skew_reverse,
    "jsd": _jsd,
    "total_variation": _total_variation,
    "mse_logprobs": _mse_logprobs,
    "mse_probs": _mse_probs,
    "sampled": _sampled,
}
