"""From a device's top-k to the rows of a store: entries kept, side columns, refused rows.

Legend: M positions with a target in a batch, E entries, n tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill.storage import SparseTargets, TargetsRow, TokensRow, token_digest
from potstill.storage.rows.grid import WEIGHT_TOP
from potstill.teacher_dump.batches import target_mask
from potstill.teacher_dump.config import SelectionConfig

if TYPE_CHECKING:
    from potstill.kernels.topk import TopK
    from potstill.kernels.types import SparseTargetTensors

NO_RANK = 255
# Logits of -Inf (ids that a teacher rules out) are read as this: their mass is 0 all the same, but p log p is a number.
RULED_OUT_LOGIT = -1e4
TARGET_STATS = ("mean_loss", "mean_entropy", "accuracy", "kept_mass", "num_targets")


def _top_k(topk: TopK, selection: SelectionConfig) -> SparseTargetTensors:
    import torch

    from potstill.kernels.types import SparseTargetTensors

    # Nothing is dropped: the width of the top-k is the k of the selection, or the whole vocabulary.
    num_tokens, width = topk.ids.shape
    assert width <= selection.k
    return SparseTargetTensors(
        offsets=torch.arange(num_tokens + 1) * width,
        ids=topk.ids.flatten(),
        logprobs=topk.logprobs.flatten(),
        counts=None,
        num_draws=None,
        log_tail=topk.log_tail,
        log_tail_at=topk.log_tail_at,
        max_entries=width,
    )


def _top_p_k(topk: TopK, selection: SelectionConfig) -> SparseTargetTensors:
    from potstill.kernels.topk import select_top_p_k

    return select_top_p_k(topk, selection.p, min(selection.k, topk.ids.shape[1]))


# Selections that are a prefix of the top-k; mode `sample` draws on the device instead.
PREFIXES: dict[str, Callable[[TopK, SelectionConfig], SparseTargetTensors]] = {"top_k": _top_k, "top_p_k": _top_p_k}


def selection_spec(selection: SelectionConfig) -> Mapping[str, Any]:
    """The `selection` field of run.json."""
    if selection.mode == "sample":
        spec: dict[str, Any] = {"mode": "sample", "num_draws": selection.num_draws}
        return spec if selection.power == 1.0 else spec | {"power": selection.power}
    if selection.mode == "top_p_k":
        return {"mode": "top_p_k", "k": selection.k, "p": selection.p}
    return {"mode": "top_k", "k": selection.k}


@dataclass(frozen=True, kw_only=True)
class HostTargets:
    """Results of a batch on the host, one per target position [M]; entries as CSR (offsets [M + 1]).

    Entries carry logprobs, or counts out of `num_draws`, or log weights of as many draws from a power of p.
    """

    offsets: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray | None = None
    counts: np.ndarray | None = None
    log_weights: np.ndarray | None = None
    num_draws: int | None = None
    log_tail: np.ndarray
    log_tail_at: Mapping[float, np.ndarray] = field(default_factory=dict)
    entropy: np.ndarray
    label_logprob: np.ndarray
    label_rank: np.ndarray
    excluded_mass: np.ndarray
    lse: np.ndarray


@dataclass(frozen=True)
class Refused:
    """A row that is stored without targets, and why."""

    row: int
    reason: str


def cut_rows(found: HostTargets, rows: Sequence[TokensRow]) -> Iterator[tuple[TargetsRow, Refused | None]]:
    """Cut a batch's results [M] into store rows; a row with NaN or +Inf logits comes out without targets.

    Nothing is checked here: the store's writer checks every rule once, as for any other caller.
    """
    start = 0
    for row in rows:
        mask = target_mask(row.doc_lens)
        stop = start + int(mask.sum())
        reason = refusal(found.lse[start:stop], found.entropy[start:stop], mask) or too_heavy(found, start, stop)
        digest = token_digest(row.tokens, row.doc_lens)
        if reason is not None:
            stats = dict.fromkeys(TARGET_STATS, 0.0)
            yield TargetsRow(row.row, digest, without_targets(found, len(row.tokens)), stats), Refused(row.row, reason)
        else:
            yield TargetsRow(row.row, digest, _row_targets(found, start, stop, mask), _stats(found, start, stop)), None
        start = stop


def refusal(lse: np.ndarray, entropy: np.ndarray, mask: np.ndarray) -> str | None:
    """Why a row is refused, or None: its logits hold NaN or +Inf, or all of them are -Inf."""
    # The normaliser shows every bad logit of its token: NaN spreads, +Inf stays, and all -Inf makes -Inf.
    bad = np.flatnonzero(~np.isfinite(lse) | ~np.isfinite(entropy) | (lse < RULED_OUT_LOGIT / 2))
    if not len(bad):
        return None
    token = int(np.flatnonzero(mask)[bad[0]])
    return (
        f"logits are not finite at {len(bad)} of {len(lse)} positions, first at token {token} (log-sum {lse[bad[0]]})"
    )


def too_heavy(found: HostTargets, start: int, stop: int) -> str | None:
    """Why a row is refused, or None: a draw so rare that its weight is above what a store can hold."""
    if found.log_weights is None or start == stop:
        return None
    weights = found.log_weights[int(found.offsets[start]) : int(found.offsets[stop])]
    if weights.max() <= WEIGHT_TOP:
        return None
    return f"a draw has the log weight {weights.max()}, a store holds up to {WEIGHT_TOP}; use a power nearer to 1"


def without_targets(found: HostTargets, num_tokens: int) -> SparseTargets:
    """Targets of a row that has none, with the columns that every row of this dump has."""
    zeros = np.zeros(num_tokens, np.float32)
    return SparseTargets(
        offsets=np.zeros(num_tokens + 1, np.int64),
        ids=np.zeros(0, np.int32),
        logprobs=None if found.logprobs is None else np.zeros(0, np.float32),
        counts=None if found.counts is None else np.zeros(0, np.uint8),
        log_weights=None if found.log_weights is None else np.zeros(0, np.float32),
        num_draws=found.num_draws,
        log_tail=zeros,
        entropy=zeros.copy(),
        label_logprob=zeros.copy(),
        label_rank=np.full(num_tokens, NO_RANK, np.int32),
        log_tail_at={t: zeros.copy() for t in found.log_tail_at},
    )


def _row_targets(found: HostTargets, start: int, stop: int, mask: np.ndarray) -> SparseTargets:
    num_tokens = len(mask)
    entries = np.zeros(num_tokens, np.int64)
    entries[mask] = np.diff(found.offsets[start : stop + 1])
    part = slice(int(found.offsets[start]), int(found.offsets[stop]))
    ids = found.ids[part]
    logprobs = None if found.logprobs is None else found.logprobs[part]
    if logprobs is not None:
        live = logprobs > RULED_OUT_LOGIT / 2  # k reached into ids that the teacher rules out: they are no entries
        if not live.all():
            token_of = np.repeat(np.arange(num_tokens), entries)[live]
            entries = np.bincount(token_of, minlength=num_tokens)
            ids, logprobs = ids[live], logprobs[live]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(entries, dtype=np.int64)])
    if logprobs is not None:
        ids, logprobs = ordered(offsets, ids, logprobs)

    def spread(values: np.ndarray, fill: float = 0.0) -> np.ndarray:
        wide = np.full(num_tokens, fill, values.dtype)
        wide[mask] = values[start:stop]
        return wide

    return SparseTargets(
        offsets=offsets,
        ids=ids,
        logprobs=logprobs,
        counts=None if found.counts is None else found.counts[part],
        log_weights=None if found.log_weights is None else found.log_weights[part],
        num_draws=found.num_draws,
        log_tail=spread(found.log_tail),
        entropy=spread(found.entropy),
        label_logprob=spread(found.label_logprob),
        label_rank=np.minimum(spread(found.label_rank, NO_RANK), NO_RANK).astype(np.int32),
        log_tail_at={t: spread(values) for t, values in found.log_tail_at.items()},
    )


def ordered(offsets: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put ties by ascending id. Logits that differ in the last bit can become equal log-probabilities."""
    tied = (logprobs[1:] == logprobs[:-1]) & (ids[1:] < ids[:-1])
    edges = offsets[1:-1]
    tied[edges[(edges > 0) & (edges < len(ids))] - 1] = False
    if not tied.any():
        return ids, logprobs
    # Few tokens have such a tie, and sorting all of them would cost more than the encoder.
    touched = np.zeros(len(offsets) - 1, dtype=bool)
    touched[np.searchsorted(offsets, np.flatnonzero(tied), side="right") - 1] = True
    place = np.flatnonzero(np.repeat(touched, np.diff(offsets)))
    order = np.lexsort((ids[place], -logprobs[place], np.searchsorted(offsets, place, side="right")))
    ids, logprobs = ids.copy(), logprobs.copy()
    ids[place], logprobs[place] = ids[place][order], logprobs[place][order]
    return ids, logprobs


def _stats(found: HostTargets, start: int, stop: int) -> dict[str, float]:
    if start == stop:
        return dict.fromkeys(TARGET_STATS, 0.0)
    kept = -np.expm1(np.minimum(found.log_tail[start:stop].astype(np.float64), 0.0))
    return {
        "mean_loss": -float(found.label_logprob[start:stop].astype(np.float64).mean()),
        "mean_entropy": float(found.entropy[start:stop].astype(np.float64).mean()),
        "accuracy": float((found.label_rank[start:stop] == 0).mean()),
        "kept_mass": float(kept.mean()),
        "num_targets": float(stop - start),
    }
