"""From a device's top-k to the rows of a store: entries kept, side columns, refused rows.

Legend: M positions with a target in a batch, E entries, n tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill.storage import SparseTargets, TargetsRow, TokensRow, token_digest
from potstill.storage.rows.value_grid import WEIGHT_TOP
from potstill.teacher_dump.config import SelectionConfig

if TYPE_CHECKING:
    from potstill.kernels.topk import TopK
    from potstill.kernels.types import SparseTargetTensors

NO_RANK = 255
# Ids that a teacher rules out (logits of -Inf) have log-probabilities below half of this, a label among them has this.
RULED_OUT_LOGIT = -1e4
TARGET_STATS = ("mean_loss", "mean_entropy", "accuracy", "kept_mass", "num_targets")
OF_ENTROPY = "mean_entropy"  # of the statistics the one that a store without entropies has not


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
class HostBatch:
    """Results of a batch on the host: targets of its M positions, and what is not stored of each of them.

    excluded_mass float32 [M], mass of ids beyond the vocabulary; lse float32 [M], which shows every bad logit, or None
    of an engine that sees log-probabilities alone: there label_logprob is NaN at such a position.
    """

    targets: SparseTargets
    excluded_mass: np.ndarray
    lse: np.ndarray | None


@dataclass(frozen=True)
class Refused:
    """A row that is stored without targets, and why."""

    row: int
    reason: str


def cut_rows(
    found: HostBatch, rows: Sequence[TokensRow], *, entropy: bool = True
) -> Iterator[tuple[TargetsRow, Refused | None]]:
    """Cut a batch's results [M] into store rows; a row with NaN or +Inf logits comes out without targets.

    entropy: whether the rows keep it. Nothing is checked here: the store's writer checks every rule once, as for any
    other caller.
    """
    start = 0
    for number, row in enumerate(rows):
        mask = row.has_target()
        stop = start + int(mask.sum())
        part = found.targets.slice(start, stop, rows=slice(number, number + 1))
        reason = _refusal_of(part, None if found.lse is None else found.lse[start:stop], mask) or too_heavy(part)
        if not entropy:
            part = SparseTargets(offsets=part.offsets, columns=part.columns, num_draws=part.num_draws, entropy=None)
        digest = token_digest(row.tokens, row.doc_lens)
        if reason is not None:
            stats = dict.fromkeys(target_stats(entropy=entropy), 0.0)
            yield TargetsRow(row.row, digest, part.without_targets(len(mask)), stats), Refused(row.row, reason)
        else:
            yield TargetsRow(row.row, digest, _row_targets(part, mask), _stats(part)), None
        start = stop


def target_stats(*, entropy: bool) -> tuple[str, ...]:
    """Names of the statistics of a row of targets, in a store with entropies or without."""
    return tuple(name for name in TARGET_STATS if entropy or name != OF_ENTROPY)


def _refusal_of(part: SparseTargets, lse: np.ndarray | None, mask: np.ndarray) -> str | None:
    """See refusal; where there is no normaliser, by the label's log-probability."""
    if lse is not None:
        assert part.entropy is not None
        return refusal(lse, part.entropy, mask)
    assert part.label_logprob is not None
    bad = np.flatnonzero(np.isnan(part.label_logprob))
    if not len(bad):
        return None
    token = int(np.flatnonzero(mask)[bad[0]])
    return f"log-probabilities are not finite at {len(bad)} of {int(mask.sum())} positions, first at token {token}"


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


def too_heavy(part: SparseTargets) -> str | None:
    """Why a row is refused, or None: a draw so rare that its weight is above what a store can hold."""
    kind, weights = part.entry_column
    if kind != "weight" or not len(weights) or weights.max() <= WEIGHT_TOP:
        return None
    return f"a draw has the log weight {weights.max()}, a store holds up to {WEIGHT_TOP}; use a power nearer to 1"


def _row_targets(part: SparseTargets, mask: np.ndarray) -> SparseTargets:
    """The row's targets at all its n tokens, from those of its M positions, which `mask` [n] marks."""
    if part.logprobs is not None:
        live = part.logprobs > RULED_OUT_LOGIT / 2  # k reached into ids that the teacher rules out: they are no entries
        part = part if live.all() else part.keep_entries(live)
    wide = part.spread(mask)
    if wide.logprobs is None:
        return wide
    order = order_of_ties(wide.offsets, wide.ids, wide.logprobs)
    return wide if order is None else wide.take_entries(order)


def order_of_ties(offsets: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> np.ndarray | None:
    """Order of the entries [E] that puts ties by ascending id, or None where they stand so.

    Logits that differ in the last bit can become equal log-probabilities.
    """
    tied = (logprobs[1:] == logprobs[:-1]) & (ids[1:] < ids[:-1])
    edges = offsets[1:-1]
    tied[edges[(edges > 0) & (edges < len(ids))] - 1] = False
    if not tied.any():
        return None
    # Few tokens have such a tie, and sorting all of them would cost more than the encoder.
    touched = np.zeros(len(offsets) - 1, dtype=bool)
    touched[np.searchsorted(offsets, np.flatnonzero(tied), side="right") - 1] = True
    place = np.flatnonzero(np.repeat(touched, np.diff(offsets)))
    order = np.arange(len(ids))
    order[place] = place[np.lexsort((ids[place], -logprobs[place], np.searchsorted(offsets, place, side="right")))]
    return order


def _stats(part: SparseTargets) -> dict[str, float]:
    loss, entropy, rank = part.label_logprob, part.entropy, part.label_rank
    if loss is None or rank is None or not part.num_tokens:
        return dict.fromkeys(target_stats(entropy=entropy is not None), 0.0)
    kept = -np.expm1(np.minimum(part.log_tail.astype(np.float64), 0.0))
    return {
        "mean_loss": -float(loss.astype(np.float64).mean()),
        **({} if entropy is None else {OF_ENTROPY: float(entropy.astype(np.float64).mean())}),
        "accuracy": float((rank == 0).mean()),
        "kept_mass": float(kept.mean()),
        "num_targets": float(part.num_tokens),
    }
