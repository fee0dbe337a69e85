"""The divergences, each one function of k + 1 buckets, and the table that names them.

A function gets log-probabilities of the teacher and the student on the same buckets (the last one is the
rest bucket, "everything not kept"; an absent bucket is -inf on both sides) and returns its value and the
partial derivatives by each log q, taken as free variables:

    f(log_p [B, K], log_q [B, K], **options) -> (value [B], a [B, K])

All else (softmax, temperature, missing mass, weights, the dense gradient) is shared: see row_terms.py.
To add one: write such a function, enter it in DIVERGENCES; the tests pick it up from there.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Terms = tuple[Tensor, Tensor]


def _times_log_ratio(p: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """p * (log a - log b) with 0 * anything = 0, so that absent buckets never make a NaN."""
    return torch.where(p > 0, p * (log_a - log_b), torch.zeros_like(p))


def _mixture(log_p: Tensor, log_q: Tensor, weight_p: float) -> Tensor:
    """log(weight_p p + (1 - weight_p) q) in log space (a mixture of underflown terms stays right)."""
    left = log_p + (math.log(weight_p) if weight_p > 0 else -math.inf)
    right = log_q + (math.log1p(-weight_p) if weight_p < 1 else -math.inf)
    return torch.logaddexp(left, right)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Terms:
    """KL(p || q) = sum p (log p - log q)."""
    p = log_p.exp()
    return _times_log_ratio(p, log_p, log_q).sum(-1), -p


def reverse_kl(log_p: Tensor, log_q: Tensor, *, floor: float) -> Terms:
    """KL(q || p) = sum q (log q - log p). log p is held at `floor` nats: a teacher bucket of mass 0 would
    make the loss infinite for every student."""
    q = log_q.exp()
    log_p = log_p.clamp_min(floor)
    terms = _times_log_ratio(q, log_q, log_p)
    return terms.sum(-1), terms + q


def skew_forward(log_p: Tensor, log_q: Tensor, *, skew: float) -> Terms:
    """KL(p || skew p + (1 - skew) q) (skew KL, DistiLLM, arXiv 2402.03898)."""
    p = log_p.exp()
    log_m = _mixture(log_p, log_q, skew)
    a = torch.where(p > 0, -(1 - skew) * (log_p + log_q - log_m).exp(), torch.zeros_like(p))
    return _times_log_ratio(p, log_p, log_m).sum(-1), a


def skew_reverse(log_p: Tensor, log_q: Tensor, *, skew: float) -> Terms:
    """KL(q || (1 - skew) p + skew q) (skew reverse KL, DistiLLM, arXiv 2402.03898)."""
    q = log_q.exp()
    log_m = _mixture(log_p, log_q, 1 - skew)
    terms = _times_log_ratio(q, log_q, log_m)
    share = torch.where(q > 0, skew * (2 * log_q - log_m).exp(), torch.zeros_like(q))
    return terms.sum(-1), terms + q - share


def jsd(log_p: Tensor, log_q: Tensor, *, beta: float) -> Terms:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649)."""
    p, q = log_p.exp(), log_q.exp()
    log_m = _mixture(log_p, log_q, beta)
    student = (1 - beta) * _times_log_ratio(q, log_q, log_m)
    return (beta * _times_log_ratio(p, log_p, log_m) + student).sum(-1), student


def total_variation(log_p: Tensor, log_q: Tensor) -> Terms:
    """1/2 sum |p - q|; the derivative at a tie is taken as 0."""
    p, q = log_p.exp(), log_q.exp()
    return 0.5 * (p - q).abs().sum(-1), 0.5 * torch.sign(q - p) * q


def mse_logprobs(log_p: Tensor, log_q: Tensor) -> Terms:
    """Mean over the kept entries of (log q - log p)^2; the rest bucket takes no part."""
    kept = torch.isfinite(log_p)
    kept[..., -1] = False
    count = kept.sum(-1, keepdim=True).clamp_min(1)
    difference = torch.where(kept, log_q - log_p, torch.zeros_like(log_p))
    return (difference.square() / count).sum(-1), 2 * difference / count


def mse_probs(log_p: Tensor, log_q: Tensor) -> Terms:
    """sum (p - q)^2 over all buckets, the rest being one (squared Euclidean distance, Brier's score less its least
    value). Bounded by 2, and its gradient 2 (q - p) q fades where the student has next to nothing."""
    p, q = log_p.exp(), log_q.exp()
    return (p - q).square().sum(-1), 2 * (q - p) * q


def sampled(log_p: Tensor, log_q: Tensor) -> Terms:
    """- sum t log q with t = draws of an id / all draws, or its importance weight: unbiased for the
    cross-entropy of teacher and student (random-sampling KD, arXiv 2503.16870). Weights sum to 1 in the mean
    only; divided by their sum (missing mass `renorm`) they vary less and are biased."""
    t = log_p.exp()
    return -_times_log_ratio(t, log_q, torch.zeros_like(log_q)).sum(-1), -t


@dataclass(frozen=True)
class Divergence:
    """One entry of the table: the function, its options with defaults, where it makes sense.

    needs_counts: it is for sampled targets, with draw counts or with the log weights that stand for them.
    lowest_teacher_temperature: the least temperature of the teacher alone that it takes; the others take any, down to
    the teacher's argmax as a label.
    """

    function: Callable[..., Terms]
    modes: tuple[str, ...] = ("tail", "renorm", "support", "label", "raw")
    options: Mapping[str, float] = field(default_factory=dict)
    needs_counts: bool = False
    lowest_teacher_temperature: float = 0.0


# reverse_kl off the support is infinite unless the rest bucket holds teacher mass, and its raw truncated
# sum (like that of skew_reverse) is least at q != p: those pairs are refused, not fudged.
DIVERGENCES: Mapping[str, Divergence] = {
    "forward_kl": Divergence(forward_kl),
    "reverse_kl": Divergence(reverse_kl, modes=("tail", "support"), options={"floor": -30.0}),
    "skew_forward": Divergence(skew_forward, options={"skew": 0.1}),
    "skew_reverse": Divergence(skew_reverse, modes=("tail", "renorm", "support", "label"), options={"skew": 0.1}),
    "jsd": Divergence(jsd, options={"beta": 0.5}),
    "total_variation": Divergence(total_variation),
    "mse_logprobs": Divergence(mse_logprobs, lowest_teacher_temperature=0.01),
    "mse_probs": Divergence(mse_probs),
    "sampled": Divergence(sampled, modes=("tail", "renorm", "raw"), needs_counts=True),
}
