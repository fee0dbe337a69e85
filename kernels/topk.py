"""The teacher's side: its k best ids per token with exact tails, and the selections made from them.

All figures are float32 and normalised over the ids below `vocab_size` (a head may be padded beyond it).
Order and ties: value down, then id up, on float32 logits, so that the result does not depend on a library's
choice among equals.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from potstill.kernels.checks import check_tensor
from potstill.kernels.sampling import (
    as_targets,
    count_draws,
    draw_ids,
    weigh_draws,
)
from potstill.kernels.teacher_pass import TopKTable
from potstill.kernels.teacher_rows import LogitSource, TeacherChunk
from potstill.kernels.types import KernelInputError, SparseTargetTensors

__all__ = ["Sampled", "TopK", "select_sample", "select_top_k", "select_top_p_k", "teacher_topk"]

MAX_ENTRIES = 255  # a store keeps the number of entries of a token in one byte
# Outside these bounds single weights leave the grid of a store, and the estimate varies far more than at 1.
MIN_POWER, MAX_POWER = 0.5, 1.5


@dataclass(frozen=True)
class TopK:
    """The k best ids of N tokens and the teacher's figures there.

    ids int32 [N, k], logprobs float32 [N, k] (value down, id up); lse [N] and lse_at {T: [N]} of the raw
    logits; entropy [N] nats; label_logprob [N] and label_rank int32 [N] (0 = argmax; 0.0 and 255 without a
    label); excluded_mass [N], softmax mass of the head's rows at and above vocab_size, before they are left
    out; log_tail [N] and log_tail_at {T: [N]}, log mass outside the k ids (-inf: none).
    A logit of -Inf rules its id out: log-probability -inf, nothing in any sum. A token whose logits are all -Inf
    has lse -inf and entropy NaN; one with a NaN has NaN in lse and entropy.
    """

    ids: Tensor
    logprobs: Tensor
    lse: Tensor
    lse_at: Mapping[float, Tensor]
    entropy: Tensor
    label_logprob: Tensor
    label_rank: Tensor
    excluded_mass: Tensor
    log_tail: Tensor
    log_tail_at: Mapping[float, Tensor]


class TeacherOptions(TypedDict, total=False):
    """Keyword options of the teacher's calls, with their defaults.

    hidden [N, D] with weight [V, D] and bias [V] (None), or logits [N, V]: floats of one dtype and device.
    vocab_size (None: V): ids at and above it are never taken.
    labels (None): int64 [N], -100 none. temperatures (()): further T > 0 for lse and tails.
    soft_cap (None), logit_scale (1): z = cap * tanh(scale * raw / cap).
    chunk_bytes (None: 1 GiB on a GPU, 64 MiB on a CPU): bound of the float32 logits kept at a time.
    backend ("auto"): "torch", "triton", or by device.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    logits: Tensor | None
    vocab_size: int | None
    temperatures: Sequence[float]
    labels: Tensor | None
    soft_cap: float | None
    logit_scale: float
    chunk_bytes: int | None
    backend: str


@torch.no_grad()
def teacher_topk(*, k: int, **options: Unpack[TeacherOptions]) -> TopK:
    """The k best ids of each token (1 <= k <= 255), from hidden states and a head or from logits; chunked.

    Raises KernelInputError that names the argument.
    """
    source = LogitSource.check(**options)
    if not 1 <= k <= min(MAX_ENTRIES, source.vocab_size):
        raise KernelInputError(f"k is {k}; expected 1 .. {min(MAX_ENTRIES, source.vocab_size)}")
    run = source.backend.top_k
    if run is not None:
        num_temperatures = len(source.temperatures)
        table = TopKTable.empty(source.labels.shape[0], k, num_temperatures, source.labels.device)
        for start, rows in source.rows_as_given(run.row_bytes(source.vocab_size, k, num_temperatures)):
            run(rows, k, table.narrow(start, rows.labels.shape[0]))
        return TopK(**table.columns(source.temperatures))  # type: ignore[arg-type]
    parts = [_topk_of(chunk, k) for chunk in source.chunks()]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    def joined_at(name: str) -> dict[float, Tensor]:
        return {t: torch.cat([getattr(part, name)[t] for part in parts]) for t in source.temperatures}

    names = ("ids", "logprobs", "lse", "entropy", "label_logprob", "label_rank", "excluded_mass", "log_tail")
    return TopK(
        **{name: joined(name) for name in names},
        lse_at=joined_at("lse_at"),
        log_tail_at=joined_at("log_tail_at"),
    )


def _topk_of(chunk: TeacherChunk, k: int) -> TopK:
    best = chunk.best(k)
    log_tails = best.rest.log() - chunk.log_totals  # [1 + nT, B]
    lse = chunk.lse
    return TopK(
        ids=best.ids.int(),
        logprobs=chunk.logprobs(best.logits),
        lse=lse[0],
        lse_at=dict(zip(chunk.temperatures, lse[1:], strict=True)),
        entropy=chunk.entropy,
        label_logprob=chunk.label_logprob,
        label_rank=chunk.label_rank,
        excluded_mass=chunk.excluded_mass,
        log_tail=log_tails[0],
        log_tail_at=dict(zip(chunk.temperatures, log_tails[1:], strict=True)),
    )


def select_top_k(topk: TopK, k: int, *, valid: Tensor | None = None) -> SparseTargetTensors:
    """The first k entries of each token; `valid` bool [N] marks the tokens that have a target at all."""
    _check_selection(topk, k, valid)
    counts = torch.full(topk.ids.shape[:1], k, dtype=torch.int64, device=topk.ids.device)
    return _selected(topk, counts, valid)


def select_top_p_k(topk: TopK, p: float, k: int, *, valid: Tensor | None = None) -> SparseTargetTensors:
    """The smallest prefix whose mass is at least p, never more than k entries and never less than one."""
    _check_selection(topk, k, valid)
    if not 0 < p <= 1:
        raise KernelInputError(f"p is {p}; expected 0 < p <= 1")
    before = topk.logprobs[:, :k].double().exp().cumsum(1)[:, :-1]  # mass of the first 1, 2, .. entries
    return _selected(topk, 1 + (before < p).sum(1), valid)


def _check_selection(topk: TopK, k: int, valid: Tensor | None) -> None:
    num_tokens, width = topk.ids.shape
    if not 1 <= k <= width:
        raise KernelInputError(f"k is {k}; expected 1 .. {width}, the entries that were taken per token")
    if valid is not None:
        check_tensor("valid", valid, shape=(num_tokens,), dtypes=(torch.bool,), device=topk.ids.device)


def _selected(topk: TopK, counts: Tensor, valid: Tensor | None) -> SparseTargetTensors:
    """The first counts[n] entries of token n, with the dropped ones added to the tails."""
    if valid is not None:
        counts = torch.where(valid, counts, 0)
    num_tokens, width = topk.ids.shape
    keep = torch.arange(width, device=counts.device) < counts[:, None]  # [N, k]
    offsets = torch.zeros(num_tokens + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=offsets[1:])

    def tail(log_tail: Tensor, logprobs: Tensor) -> Tensor:
        dropped = torch.logsumexp(torch.where(keep, -math.inf, logprobs), 1)
        total = torch.logaddexp(log_tail, dropped)
        return total if valid is None else torch.where(valid, total, 0.0)

    logits = topk.logprobs + topk.lse[:, None]
    return SparseTargetTensors(
        offsets=offsets,
        ids=topk.ids[keep],
        logprobs=topk.logprobs[keep],
        counts=None,
        num_draws=None,
        log_tail=tail(topk.log_tail, topk.logprobs),
        log_tail_at={
            t: tail(log_tail, logits / t - topk.lse_at[t][:, None]) for t, log_tail in topk.log_tail_at.items()
        },
        max_entries=width,
    )


@dataclass(frozen=True)
class Sampled:
    """Draws from the teacher's distribution at T = 1 and its figures, each [N] as in TopK.

    targets: CSR of drawn ids with counts (most drawn first, then the lowest id), or with log weights on the
    store's grid where the power is not 1 (heaviest first, then the lowest id; above WEIGHT_TOP: too heavy
    for a store). Its log_tail is the log mass of the ids that are no entries.
    """

    targets: SparseTargetTensors
    lse: Tensor
    entropy: Tensor
    label_logprob: Tensor
    label_rank: Tensor
    excluded_mass: Tensor


@torch.no_grad()
def select_sample(
    *,
    num_draws: int,
    seed: int,
    rows: Tensor,
    positions: Tensor,
    power: float = 1.0,
    valid: Tensor | None = None,
    **options: Unpack[TeacherOptions],
) -> Sampled:
    """num_draws (1 .. 255) ids of each token with replacement from p^power, options as in teacher_topk.

    rows, positions: int64 [N], the row of the store and the place in it of each token. With the seed they
    key the draws, so that batch size, order and ranks do not matter. valid bool [N]: tokens with a target.
    power (0.5 .. 1.5): at 1 the targets hold counts, else importance weights whose mean is p.
    """
    if any(temperature != 1.0 for temperature in options.get("temperatures", ())):
        raise KernelInputError("temperatures are given, but draws hold at T = 1 only")
    if not MIN_POWER <= power <= MAX_POWER:
        raise KernelInputError(f"power is {power}; expected {MIN_POWER} .. {MAX_POWER}")
    if not 1 <= num_draws <= MAX_ENTRIES:
        raise KernelInputError(f"num_draws is {num_draws}; expected 1 .. {MAX_ENTRIES}")
    options["temperatures"] = () if power == 1.0 else (1 / power,)  # p^power is a softmax at T = 1 / power
    source = LogitSource.check(**options)
    num_tokens, device = source.labels.shape[0], source.labels.device
    for name, value in (("rows", rows), ("positions", positions)):
        check_tensor(name, value, shape=(num_tokens,), dtypes=(torch.int64,), device=device)
    if valid is not None:
        check_tensor("valid", valid, shape=(num_tokens,), dtypes=(torch.bool,), device=device)
    drawn, figures, start = [], [], 0
    for chunk in source.chunks():
        part = slice(start, start + chunk.labels.shape[0])
        start = part.stop
        row, position = rows[part], positions[part]
        ids = draw_ids(chunk, seed=seed, rows=row, positions=position, num_draws=num_draws)
        entries, kept, values = count_draws(ids, None if valid is None else valid[part], vocab_size=source.vocab_size)
        if power != 1.0:
            weighed = (chunk, entries, kept, values)
            entries, kept, values = weigh_draws(*weighed, seed=seed, rows=row, positions=position, num_draws=num_draws)
        token = torch.repeat_interleave(torch.arange(ids.shape[0], device=device), entries)
        mass = torch.zeros(ids.shape[0], dtype=torch.float64, device=device)
        mass.index_add_(0, token, (chunk.slab[token, kept.long()] - chunk.lse[0][token]).double().exp())
        tail = torch.where(entries > 0, (1 - mass).clamp_min(0).log(), 0.0).float()
        drawn.append((entries, kept, values, tail))
        figures.append((chunk.lse[0], chunk.entropy, chunk.label_logprob, chunk.label_rank, chunk.excluded_mass))
    entries, kept, values, tail = (torch.cat(column) for column in zip(*drawn, strict=True))
    targets = as_targets(entries, kept, values, weighted=power != 1.0, log_tail=tail, num_draws=num_draws)
    return Sampled(targets, *(torch.cat(column) for column in zip(*figures, strict=True)))
