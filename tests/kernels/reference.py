"""An independent float64 reading of the loss: one token at a time, plain probabilities, autograd."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.kernels.loss import linear_sparse_loss
from potstill.kernels.types import SparseTargetTensors

FLOOR = math.exp(-30.0)


def make_targets(
    num_tokens: int,
    vocab_size: int,
    counts: Sequence[int],
    *,
    temperatures: Sequence[float] = (2.0,),
    seed: int = 0,
    scale: float = 2.0,
) -> SparseTargetTensors:
    """Top entries of random teachers with the tails a dump would store; counts[n % len] entries each."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, vocab_size, generator=generator, dtype=torch.float64) * scale
    ids, values, tails = [], [], {t: [] for t in (1.0, *temperatures)}
    for n in range(num_tokens):
        log_p = logits[n].log_softmax(0)
        best = log_p.topk(counts[n % len(counts)])
        ids.append(best.indices)
        values.append(best.values)
        for t, into in tails.items():
            rest = (logits[n] / t).log_softmax(0).index_fill(0, best.indices, -math.inf)
            into.append(rest.logsumexp(0) if len(best.indices) else torch.zeros((), dtype=torch.float64))
    sizes = torch.tensor([0, *(len(x) for x in ids)])
    return SparseTargetTensors(
        offsets=sizes.cumsum(0),
        ids=torch.cat(ids).int(),
        logprobs=torch.cat(values).float(),
        counts=None,
        num_draws=None,
        log_tail=torch.stack(tails.pop(1.0)).float(),
        log_tail_at={t: torch.stack(value).float() for t, value in tails.items()},
    )


def as_draws(targets: SparseTargetTensors, num_draws: int) -> SparseTargetTensors:
    """The same ids with made-up draw counts that sum to num_draws per token (where it has entries)."""
    counts = torch.ones(targets.num_entries)
    for n in range(targets.num_tokens):
        a, b = int(targets.offsets[n]), int(targets.offsets[n + 1])
        if b > a:
            counts[a] += num_draws - (b - a)
    return SparseTargetTensors(
        offsets=targets.offsets,
        ids=targets.ids,
        logprobs=None,
        counts=counts,
        num_draws=num_draws,
        log_tail=targets.log_tail,
    )


def as_weights(targets: SparseTargetTensors) -> SparseTargetTensors:
    """The same ids with log weights on the store's grid in place of log-probabilities; sums off 1 on both sides."""
    step = torch.arange(targets.num_entries) % 7 / 16
    return SparseTargetTensors(
        offsets=targets.offsets,
        ids=targets.ids,
        logprobs=None,
        counts=None,
        num_draws=12,
        log_tail=targets.log_tail,
        log_weights=(targets.logprobs * 16).round() / 16 + step,
    )


def losses_per_token(
    *, hidden: Tensor, weight: Tensor, labels: Tensor, targets: SparseTargetTensors | None, **options: Any
) -> Tensor:
    """The loss of each token alone [N], by the fused op on one token at a time; options as there."""
    kd_weights = options.pop("kd_weights", None)
    losses = []
    for n in range(hidden.shape[0]):
        own = options if kd_weights is None else {**options, "kd_weights": kd_weights[n : n + 1]}
        few = None if targets is None else targets.select(torch.tensor([n]))
        loss, _ = linear_sparse_loss(
            hidden=hidden[n : n + 1], weight=weight, labels=labels[n : n + 1], targets=few, **own
        )
        losses.append(loss)
    return torch.stack(losses)


def teacher_of(
    targets: SparseTargetTensors, n: int, temperature: float, mode: str, label: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids of the support, their masses, mass of the rest) of one token, after temperature and mode."""
    a, b = int(targets.offsets[n]), int(targets.offsets[n + 1])
    ids = targets.ids[a:b].long()
    none = torch.zeros((), dtype=torch.float64)
    if targets.log_weights is not None:
        weights = targets.log_weights[a:b].double().exp()
        return ids, weights / weights.sum() if mode == "renorm" else weights, none
    if targets.counts is not None:
        return ids, targets.counts[a:b].double() / targets.num_draws, none
    powered = targets.logprobs[a:b].double().exp() ** (1 / temperature)
    if mode in ("renorm", "support"):
        return ids, powered / powered.sum(), none
    if temperature == 1.0:
        rest = targets.log_tail[n].double().exp()
        if mode == "raw":
            return ids, powered, none
        p, rest = powered / (powered.sum() + rest), rest / (powered.sum() + rest)
    else:
        rest = targets.log_tail_at[temperature][n].double().exp()
        p = powered / powered.sum() * (1 - rest)
        if mode == "raw":
            return ids, p, none
    if mode == "label":
        if label in ids.tolist():
            p = p + rest * (ids == label)
        else:
            ids, p = torch.cat([ids, torch.tensor([label])]), torch.cat([p, rest[None]])
        rest = none
    return ids, p, rest


def divergence_of(name: str, p: Tensor, q: Tensor, options: Mapping[str, float]) -> Tensor:
    """One divergence on whole bucket vectors; the rest bucket is last."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        keep = a > 0
        return (a[keep] * (a[keep] / b[keep]).log()).sum()

    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p.clamp_min(FLOOR))
    if name == "skew_forward":
        return kl(p, options["skew"] * p + (1 - options["skew"]) * q)
    if name == "skew_reverse":
        return kl(q, (1 - options["skew"]) * p + options["skew"] * q)
    if name == "jsd":
        m = options["beta"] * p + (1 - options["beta"]) * q
        return options["beta"] * kl(p, m) + (1 - options["beta"]) * kl(q, m)
    if name == "total_variation":
        return 0.5 * (p - q).abs().sum()
    if name == "mse_logprobs":
        kept = (p > 0) & (torch.arange(len(p)) < len(p) - 1)
        return (p[kept].log() - q[kept].log()).square().mean()
    if name == "mse_probs":
        return (p - q).square().sum()
    if name == "sampled":
        keep = p > 0
        return -(p[keep] * q[keep].log()).sum()
    raise AssertionError(f"no reference for divergence {name!r}: add one here")


def reference_loss(
    raw: Tensor,
    targets: SparseTargetTensors | None,
    labels: Tensor,
    *,
    weights: Tensor,
    kd_weights: Tensor | None = None,
    alpha: float = 1.0,
    ce_weight: float = 0.0,
    off_kd: str = "nothing",
    temperature: float = 1.0,
    temperature_side: str = "both",
    divergence: str = "forward_kl",
    missing_mass: str = "tail",
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    options: Mapping[str, float] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """(weighted sum of token losses, sums by name) of raw logits [N, V] in float64."""
    student_temperature = {"both": temperature, "teacher": 1.0}[temperature_side]
    total, sums = raw.new_zeros(()), {"kd": 0.0, "ce": 0.0, "entropy": 0.0, "student_mass": 0.0, "kept_mass": 0.0}
    for n in range(raw.shape[0]):
        weight, label = float(weights[n]), int(labels[n])
        if weight == 0:
            continue
        kd_weight = 1.0 if kd_weights is None else float(kd_weights[n])
        z = logit_scale * raw[n]
        if soft_cap is not None:
            z = soft_cap * torch.tanh(z / soft_cap)
        log_q1 = z.log_softmax(0)
        total = total + weight * z_loss * z.logsumexp(0).square()
        sums["entropy"] -= weight * float((log_q1.exp() * log_q1).sum().detach())
        distils = targets is not None and int(targets.offsets[n]) < int(targets.offsets[n + 1])
        distils = distils and not (missing_mass == "label" and label < 0)
        if label >= 0:
            is_off = kd_weight == 0 or not distils
            factor = ce_weight + alpha if off_kd == "ce" and is_off else ce_weight
            total = total - weight * factor * log_q1[label]
            sums["ce"] -= weight * float(log_q1[label].detach())
        if not distils:
            continue
        ids, p, p_rest = teacher_of(targets, n, temperature, missing_mass, label)
        q_all = (z / student_temperature).softmax(0)
        q, q_rest = q_all[ids], q_all.sum() - q_all[ids].sum()
        sums["student_mass"] += weight * float(q.sum().detach())
        sums["kept_mass"] += weight * float(p.sum())
        if missing_mass == "support":
            q, q_rest = q / q.sum(), q.new_zeros(())
        elif missing_mass == "raw" or divergence == "sampled":
            q_rest = q.new_zeros(())
        buckets = torch.cat([p, p_rest[None]]), torch.cat([q, q_rest[None]])
        value = divergence_of(divergence, *buckets, options or {})
        total = total + weight * kd_weight * alpha * student_temperature**2 * value
        sums["kd"] += weight * kd_weight * float(value.detach())
    return total, sums
