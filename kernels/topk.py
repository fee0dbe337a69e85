"""The teacher's side: its k best ids per token with exact tails, and the selections made from them.

All figures are float32 and normalised over the ids below `vocab_size` (a head may be padded beyond it).
Order and ties: value down, then id up, on float32 logits, so that the result does not hang on a library's
choice among equals.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.kernels.settings import check_tensor
from potstill.kernels.teacher_rows import LogitSource, TeacherChunk
from potstill.kernels.types import KernelInputError, SparseTargetTensors

__all__ = ["TopK", "select_top_k", "select_top_p_k", "teacher_topk"]

MAX_ENTRIES = 255  # a store keeps the number of entries of a token in one byte


@dataclass(frozen=True)
class TopK:
    """The k best ids of N tokens and the teacher's figures there.

    ids int32 [N, k], logprobs float32 [N, k] (value down, id up); lse [N] and lse_at {T: [N]} of the raw
    logits; entropy [N] nats; label_logprob [N] and label_rank int32 [N] (0 = argmax; 0.0 and 255 without a
    label); excluded_mass [N], softmax mass of the head's rows at and above vocab_size, before they are left
    out; log_tail [N] and log_tail_at {T: [N]}, log mass outside the k ids (-inf: none).
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


@torch.no_grad()
def teacher_topk(
    *,
    hidden: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    logits: Tensor | None = None,
    k: int,
    vocab_size: int | None = None,
    temperatures: Sequence[float] = (),
    labels: Tensor | None = None,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> TopK:
    """The k best ids from hidden [N, D] and weight [V, D] (bias [V]), or from logits [N, V].

    vocab_size: ids at and above it are never kept (None: all V). temperatures: further T > 0 for which
    lse and tails are wanted. labels int64 [N], -100 none. Chunked by chunk_bytes of float32 logits.
    """
    source = LogitSource.check(
        hidden=hidden,
        weight=weight,
        bias=bias,
        logits=logits,
        vocab_size=vocab_size,
        temperatures=temperatures,
        labels=labels,
        soft_cap=soft_cap,
        logit_scale=logit_scale,
        chunk_bytes=chunk_bytes,
        backend=backend,
    )
    if not 1 <= k <= min(MAX_ENTRIES, source.vocab_size):
        raise KernelInputError(f"k is {k}; expected 1 .. {min(MAX_ENTRIES, source.vocab_size)}")
    parts = [_topk_of(chunk, k) for chunk in source.chunks()]
    if not parts:
        parts = [_topk_of(source.empty_chunk(), k)]

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
        logprobs=best.logits - lse[0][:, None],
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
