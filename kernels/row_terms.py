"""From row statistics to loss and gradient: everything of size k per token, none of size V.

One gradient form serves all divergences: with a_i = d loss / d log q_i on the kept ids S, a_r for the rest
bucket and A = sum a,

    d loss / d u_j = a_j - A q_j                     j in S
                   = (a_r - A q_r) * q_j / q_r       j outside S

so the dense pass writes one coefficient per row times exp(z_j - lse of the rest), and a few entries (the
kept ids and the label) are put in by hand. Shapes: B rows, F = K + 1 fix-up columns, the last one being the
label when it is not a kept id. All in the accumulation dtype: float32, or float64 for float64 logits.

Why the numbers come out right: probabilities stay logarithms until a divergence is taken, so that a bucket of mass
1e-30 is compared by its logarithm and not as 0; an absent bucket is -inf on both sides, and 0 * -inf never occurs
because the divergences ask for p > 0 first. The rest's share q_j / q_r is one exponential of a difference, never a
quotient of two numbers that underflow together. What is off the fix-ups is never 1 minus what is on them (rows_torch.py
says why).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from potstill.kernels.checks import tail_at
from potstill.kernels.settings import LossSettings
from potstill.kernels.types import SparseTargetTensors


@dataclass(frozen=True)
class FixSet:
    """The columns of each row that the dense pass leaves alone.

    ids [B, F] int64 (0 where unused); kept [B, F] entries of the KD support (S); used [B, F] = kept or label;
    is_label [B, F]; has_target, has_label [B]; log_p [B, F] teacher on S, log_rest [B] teacher's rest; outside [B]
    whether an id or the label is beyond the vocabulary: such a column is left out, and the token's loss is NaN.
    """

    ids: Tensor
    kept: Tensor
    used: Tensor
    is_label: Tensor
    has_target: Tensor
    has_label: Tensor
    log_p: Tensor
    log_rest: Tensor
    outside: Tensor


@dataclass(frozen=True)
class RowStats:
    """What one stream over the logits z (after scale and cap) yields, the fix-up columns left out.

    fix [B, F] z at the fix-up columns (-inf where unused); log_rest [B] log sum exp(z) over the others;
    log_rest_t [B] the same of z / T; mean_rest [B] mean of z under their softmax (0 when there are none).
    """

    fix: Tensor
    log_rest: Tensor
    log_rest_t: Tensor
    mean_rest: Tensor
    row_max: Tensor


@dataclass(frozen=True)
class RowTerms:
    """loss [B]; sums [14, B] in the order of LossSums; the gradient by z as fix-ups and two dense parts.

    Off the fix-ups it is dense_t * exp(z / T - log_rest_t) + dense_1 * exp(z - log_rest).
    """

    loss: Tensor
    sums: Tensor
    fix_grad: Tensor
    dense_t: Tensor
    dense_1: Tensor


def log1mexp(value: Tensor) -> Tensor:
    """log(1 - exp(value)) for value <= 0 without cancellation."""
    value = value.clamp_max(0)
    near = torch.log(-torch.expm1(value))
    return torch.where(value > -math.log(2), near, torch.log1p(-value.exp()))


def _safe_lse(values: Tensor) -> Tensor:
    """logsumexp over the last axis; -inf for a row of -inf."""
    return torch.logsumexp(values, -1)


def build_fix_set(
    targets: SparseTargetTensors | None,
    labels: Tensor,
    rows: Tensor,
    settings: LossSettings,
    *,
    width: int,
    vocab_size: int,
    dtype: torch.dtype,
) -> FixSet:
    """Padded targets of the tokens `rows` (int64 [B]), with the temperature and missing mass applied.

    targets: CSR of N tokens, or None; labels int64 [N], -100 none; width: K, a bound of the entries per token;
    vocab_size: V; dtype: of the log-probabilities.
    """
    num_rows = rows.shape[0]
    label = labels[rows]  # [B]
    outside = label >= vocab_size
    has_label = (label >= 0) & ~outside
    if targets is None:
        width = 0
    ids = torch.zeros(num_rows, width + 1, dtype=torch.int64, device=rows.device)
    log_p = torch.full(ids.shape, -math.inf, dtype=dtype, device=rows.device)
    kept = torch.zeros(ids.shape, dtype=torch.bool, device=rows.device)
    log_rest = torch.full((num_rows,), -math.inf, dtype=dtype, device=rows.device)
    has_target = torch.zeros(num_rows, dtype=torch.bool, device=rows.device)
    if targets is not None and width and targets.num_entries:  # nothing to look up where all tokens lack entries
        first = targets.offsets[rows]
        counts = targets.offsets[rows + 1] - first  # [B]
        column = torch.arange(width, device=rows.device)
        valid = column < counts[:, None]  # [B, K]
        entry = torch.where(valid, first[:, None] + column, 0)
        given = targets.ids[entry].long()
        inside = valid & (given >= 0) & (given < vocab_size)
        outside = outside | (valid & ~inside).any(1)
        ids[:, :-1] = torch.where(inside, given, 0)
        kept[:, :-1] = inside
        has_target = counts > 0
        values, log_rest = _teacher_buckets(targets, rows, entry, inside, settings, dtype)
        log_p[:, :-1] = values
    # The last column, and not column `width`: compiled code would be compiled anew for each value of that.
    ids[:, -1] = torch.where(has_label, label, 0)
    is_label = (ids == ids[:, -1:]) & has_label[:, None]
    is_label[:, :-1] &= kept[:, :-1]
    in_support = is_label[:, :-1].any(1)
    is_label[:, -1] = has_label & ~in_support
    if settings.missing_mass == "label":
        has_target = has_target & has_label
        to_label = torch.where(is_label, log_rest[:, None], -math.inf)
        log_p = torch.logaddexp(log_p, to_label)
        kept[:, -1] = is_label[:, -1]
        log_rest = torch.full_like(log_rest, -math.inf)
    used = kept | is_label
    return FixSet(ids, kept, used, is_label, has_target, has_label, log_p, log_rest, outside)


def _teacher_buckets(
    targets: SparseTargetTensors,
    rows: Tensor,
    entry: Tensor,
    valid: Tensor,
    settings: LossSettings,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """log p on the kept entries [B, K] (-inf where invalid) and of the rest bucket [B] (-inf where there is none).

    rows int64 [B]; entry int64 [B, K], place of each entry in the CSR arrays; valid bool [B, K].
    """
    none = torch.full(rows.shape, -math.inf, dtype=dtype, device=rows.device)
    if targets.log_weights is not None:
        weights = torch.where(valid, targets.log_weights[entry].to(dtype), -math.inf)
        if settings.missing_mass != "renorm":
            return weights, none
        total = _safe_lse(weights)
        return weights - torch.where(torch.isfinite(total), total, 0.0)[:, None], none
    if settings.entry.needs_counts:
        assert targets.counts is not None
        draws = torch.where(valid, targets.counts[entry].to(dtype), 0.0)
        total = draws.sum(1) if targets.num_draws is None else draws.new_full(rows.shape, targets.num_draws)
        return (draws / total.clamp_min(1)[:, None]).log(), none
    assert targets.logprobs is not None
    temperature, mode = settings.temperature, settings.missing_mass
    values = torch.where(valid, targets.logprobs[entry].to(dtype), -math.inf)
    if temperature != 1.0:
        values = _tempered(values, temperature)
    total = _safe_lse(values)
    total = torch.where(torch.isfinite(total), total, 0.0)  # rows without entries
    if mode in ("renorm", "support"):
        return values - total[:, None], none
    tail = tail_at(targets, temperature)[rows].to(dtype)
    if temperature != 1.0:
        # The kept entries share what the stored tail at this temperature leaves.
        values = values + (log1mexp(tail) - total)[:, None]
        return values, (none if mode == "raw" else tail)
    if mode == "raw":
        return values, none
    # Stored values and tail are each rounded to a grid, so the k + 1 buckets sum to 1 only nearly.
    norm = torch.logaddexp(total, tail)
    return values - norm[:, None], tail - norm


def _tempered(values: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [B, K] over a temperature, each row shifted so that its largest is 0.

    The shift comes first: near T = 0 the quotients are so large that a lse lost in them could not tell one largest
    entry from two equal ones. A temperature below the smallest normal number would be 0 in the division.
    """
    top = values.amax(1, keepdim=True)
    top = torch.where(torch.isfinite(top), top, 0.0)  # rows without entries
    return (values - top) / max(temperature, torch.finfo(values.dtype).tiny)


def row_terms(
    stats: RowStats,
    fix: FixSet,
    settings: LossSettings,
    *,
    factors: Tensor,
    weights: Tensor,
    kd_weights: Tensor,
) -> RowTerms:
    """Loss, sums and gradient of each row from its statistics (weights, kd_weights [B]).

    factors [4]: alpha, ce_weight, z_loss, off_weight. They are tensors because schedules change them at every step,
    and a compiled function would be compiled anew for each value.
    """
    alpha, ce_weight, z_loss, off_weight = factors.unbind(0)
    has_kd = fix.has_target & (kd_weights != 0)
    ce_weight = torch.where(has_kd, ce_weight, ce_weight + off_weight)  # [B]
    poisoned = {name: torch.where(fix.outside, math.nan, getattr(stats, name)) for name in ("log_rest", "log_rest_t")}
    stats = replace(stats, **poisoned)
    lse = torch.logaddexp(stats.log_rest, _safe_lse(stats.fix))
    log_q1 = stats.fix - lse[:, None]  # [B, F]
    label_logit = torch.where(fix.is_label, stats.fix, 0.0).sum(1)
    ce = torch.where(fix.has_label, lse - label_logit, 0.0)
    gamma = weights * (ce_weight * fix.has_label + 2 * z_loss * lse)
    q1 = log_q1.exp()
    fix_grad = gamma[:, None] * q1 - (weights * ce_weight)[:, None] * fix.is_label
    rest_share = (stats.log_rest - lse).exp()
    kd, kd_grad, dense_t, student_mass = _kd_terms(stats, fix, settings)
    kd = torch.where(fix.has_target, kd, 0.0)
    amount = weights * kd_weights * fix.has_target
    # T^2 on the loss, T on the gradient by z = T u, with the student's T: a temperature of the teacher alone shrinks
    # no gradient that a factor would have to restore. With alpha 0 not even an infinite divergence counts.
    coefficient = amount * (alpha * settings.student_temperature)
    counts = coefficient != 0
    fix_grad = fix_grad + torch.where(counts[:, None], coefficient[:, None] * kd_grad, 0.0)
    dense_t = torch.where(counts, coefficient * dense_t, 0.0)
    loss = torch.where(counts, coefficient * settings.student_temperature * kd, 0.0)
    loss = loss + weights * (ce_weight * ce + z_loss * lse.square())
    mean = rest_share * stats.mean_rest + torch.where(fix.used, q1 * stats.fix, 0.0).sum(1)
    kept_mass = torch.where(fix.kept, fix.log_p.exp(), 0.0).sum(1)
    agreement = (stats.fix[:, 0] >= stats.row_max) & fix.has_target
    correct = fix.has_label & (label_logit >= stats.row_max)
    target_weight, label_weight = weights * fix.has_target, weights * fix.has_label
    sums = [
        amount * kd,
        weights * ce,
        weights * lse.square(),
        weights,
        amount,
        target_weight * kept_mass,
        target_weight * student_mass,
        weights * agreement,
        weights * correct,
        weights * (lse - mean),
        target_weight,
        label_weight,
        fix.has_target.to(lse.dtype),
        fix.has_label.to(lse.dtype),
    ]
    return RowTerms(loss, torch.stack(sums), fix_grad, dense_t, gamma * rest_share)


def _kd_terms(stats: RowStats, fix: FixSet, settings: LossSettings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Divergence [B], its gradient by u = z / T at the fix-ups [B, F], the coefficient off them [B], Q on S [B].

    T is the student's. The coefficient is that of exp(u_j - log_rest_t), as the dense pass has it.
    """
    u = stats.fix / settings.student_temperature
    lse = torch.logaddexp(stats.log_rest_t, _safe_lse(u))[:, None]
    log_q = u - lse  # [B, F]
    outside = torch.where(fix.used & ~fix.kept, u, -math.inf)  # a label that is no kept id
    log_rest = torch.logaddexp(stats.log_rest_t, _safe_lse(outside))  # all of the rest bucket
    log_q_rest = log_rest - lse[:, 0]
    log_q_kept = torch.where(fix.kept, log_q, -math.inf)
    student_mass = log_q_kept.exp().sum(1)
    values, a = _divergence_terms(log_q_kept, log_q_rest, fix, settings)
    total = a.sum(1)
    # The gradient of the whole rest bucket, a_r - A q_r; each of its members gets its share exp(u_j - log_rest).
    # Written with Q_S = 1 - q_r and A less a_r: a difference loses all digits where little is on the kept ids.
    rest = a[:, -1] * student_mass - a[:, :-1].sum(1) * log_q_rest.exp()
    kept_grad = a[:, :-1] - total[:, None] * log_q.exp()
    share = torch.where(fix.used & ~fix.kept, (u - log_rest[:, None]).exp(), 0.0)
    grad = torch.where(fix.kept, kept_grad, rest[:, None] * share)
    inner = torch.where(torch.isfinite(log_rest), (stats.log_rest_t - log_rest).exp(), 0.0)
    return values, grad, rest * inner, student_mass


def _divergence_terms(
    log_q_kept: Tensor, log_q_rest: Tensor, fix: FixSet, settings: LossSettings
) -> tuple[Tensor, Tensor]:
    """The divergence [B] on the k + 1 buckets as the missing-mass mode lays them out, and a = d / d log q [B, F + 1].

    log_q_kept [B, F], -inf off S; log_q_rest [B].
    """
    mode, entry = settings.missing_mass, settings.entry
    rest_q = log_q_rest
    if mode == "support":
        norm = _safe_lse(log_q_kept)
        log_q_kept = log_q_kept - torch.where(torch.isfinite(norm), norm, 0.0)[:, None]
    if mode in ("support", "raw") or entry.needs_counts:
        rest_q = torch.full_like(log_q_rest, -math.inf)  # no rest bucket
    log_p = torch.cat([fix.log_p, fix.log_rest[:, None]], 1)
    log_q = torch.cat([log_q_kept, rest_q[:, None]], 1)
    value, a = entry.function(log_p, log_q, **settings.constants)
    if mode == "support":
        # Chain through q~ = q / Q_S: d log q~_i / d log q_j = [i = j] - q~_j.
        a = a - log_q.exp() * a.sum(1, keepdim=True)
    return value, a
