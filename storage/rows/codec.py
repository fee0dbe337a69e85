"""The codec: rows of each kind <-> byte planes (before compression). Pure NumPy, deterministic bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from potstill.storage.errors import CorruptError, StoreError
from potstill.storage.rows import grid
from potstill.storage.rows.planes import join_ids, num_id_planes, split_ids
from potstill.storage.rows.row_types import ScoresRow, TokensRow
from potstill.storage.rows.sparse_targets import Int32, Int64, SparseTargets, UInt8
from potstill.storage.store.spec import RunSpec

Planes = dict[str, UInt8]
TARGET_EXTRAS = ("entropy", "label", "label_rank", "tail_at")


def encode_targets(targets: SparseTargets, *, spec: RunSpec, rank_of_id: Int32 | None = None) -> Planes:
    """Planes of validated targets; optional columns that are None give empty planes."""
    ids = targets.ids if rank_of_id is None else rank_of_id.take(targets.ids)
    counts = np.diff(targets.offsets).astype(np.uint8)
    planes: Planes = {"count": counts}
    for i, plane in enumerate(split_ids(ids, num_id_planes(spec.vocab_size))):
        planes[f"id{i}"] = plane
    if spec.stores_logprobs:
        if targets.logprobs is None:
            raise StoreError("targets hold no logprobs, but the selection of this store keeps them")
        planes["val"] = grid.encode_gaps(targets.logprobs, targets.offsets)
    if spec.stores_counts:
        if targets.counts is None:
            raise StoreError("targets hold no draw counts, but this store is in sample mode")
        planes["draws"] = targets.counts
    if spec.stores_weights:
        if targets.log_weights is None:
            raise StoreError("targets hold no log_weights, but this store is in sample mode with a power other than 1")
        planes["weight"] = grid.encode_weights(targets.log_weights, targets.offsets)
    none = np.zeros(0, np.uint8)
    planes["tail"] = grid.encode_tail(targets.log_tail)
    planes["entropy"] = none if targets.entropy is None else grid.encode_entropy(targets.entropy)
    planes["label"] = none if targets.label_logprob is None else grid.encode_log(targets.label_logprob)
    planes["label_rank"] = none if targets.label_rank is None else grid.encode_rank(targets.label_rank)
    for i, temperature in enumerate(spec.temperatures):
        planes[f"tail_at{i}"] = grid.encode_odds(targets.log_tail_at[temperature], counts)
    return planes


def decode_targets(
    planes: Mapping[str, UInt8], *, spec: RunSpec, num_entries: int, id_of_rank: Int32 | None = None
) -> SparseTargets:
    """Inverse of encode_targets up to the grids; absent optional planes give None. CorruptError on nonsense."""
    counts = planes["count"]
    offsets: Int64 = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    if int(offsets[-1]) != num_entries:
        raise CorruptError(f"counts sum to {int(offsets[-1])} entries, expected {num_entries}")
    ids = join_ids([planes[f"id{i}"] for i in range(num_id_planes(spec.vocab_size))])
    if ids.size and int(ids.max()) >= spec.vocab_size:
        raise CorruptError(f"id {int(ids.max())} is not below the vocabulary size {spec.vocab_size}")
    if id_of_rank is not None:
        ids = id_of_rank.take(ids)
    tails = {
        t: grid.decode_odds(planes[f"tail_at{i}"], counts)
        for i, t in enumerate(spec.temperatures)
        if f"tail_at{i}" in planes
    }
    entropy, label, rank = (_present(planes.get(name)) for name in ("entropy", "label", "label_rank"))
    return SparseTargets(
        offsets=offsets,
        ids=ids,
        logprobs=grid.decode_gaps(planes["val"], counts, offsets) if spec.stores_logprobs else None,
        counts=planes["draws"] if spec.stores_counts else None,
        log_weights=grid.decode_weights(planes["weight"], counts, offsets) if spec.stores_weights else None,
        num_draws=spec.num_draws,
        log_tail=grid.decode_tail(planes["tail"]),
        entropy=None if entropy is None else grid.decode_entropy(entropy),
        label_logprob=None if label is None else grid.decode_log(label),
        label_rank=None if rank is None else rank.astype(np.int32),
        log_tail_at=tails,
    )


def encode_tokens(rows: Sequence[TokensRow], *, spec: RunSpec) -> Planes:
    """Planes of several rows joined."""
    tokens = np.concatenate([row.tokens for row in rows])
    planes = {f"token{i}": p for i, p in enumerate(split_ids(tokens, num_id_planes(spec.vocab_size)))}
    lengths = np.concatenate([row.doc_lens for row in rows]).astype("<u4")
    planes["doc_lens"] = np.frombuffer(lengths.tobytes(), np.uint8)
    return planes


def decode_tokens(planes: Mapping[str, UInt8], *, spec: RunSpec, row: int) -> TokensRow:
    """Inverse of encode_tokens for one row."""
    tokens = join_ids([planes[f"token{i}"] for i in range(num_id_planes(spec.vocab_size))])
    lengths = np.frombuffer(planes["doc_lens"].tobytes(), "<u4").astype(np.int64)
    if int(tokens.max(initial=0)) >= spec.vocab_size:
        raise CorruptError(f"token id {int(tokens.max())} is not below the vocabulary size {spec.vocab_size}")
    if not lengths.size or int(lengths.min()) < 1 or int(lengths.sum()) != len(tokens):
        raise CorruptError(f"document lengths sum to {int(lengths.sum())}, expected {len(tokens)} tokens")
    return TokensRow(row, tokens, lengths.astype(np.int32))


def encode_scores(rows: Sequence[ScoresRow]) -> Planes:
    """Planes of several rows joined."""
    loss = -np.concatenate([row.label_logprob for row in rows])
    label0, label1 = grid.encode_fine(loss)
    entropy0, entropy1 = grid.encode_fine(np.concatenate([row.entropy for row in rows]))
    rank = grid.encode_rank(np.concatenate([row.label_rank for row in rows]))
    return {
        "label0": label0,
        "label1": label1,
        "label_rank": rank,
        "entropy0": entropy0,
        "entropy1": entropy1,
    }


def decode_scores(planes: Mapping[str, UInt8], *, row: int, digest: int, stats: Mapping[str, float]) -> ScoresRow:
    """Inverse of encode_scores for one row."""
    return ScoresRow(
        row=row,
        token_digest=digest,
        label_logprob=np.float32(0.0) - grid.decode_fine(planes["label0"], planes["label1"]),
        label_rank=planes["label_rank"].astype(np.int32),
        entropy=grid.decode_fine(planes["entropy0"], planes["entropy1"]),
        stats=stats,
    )


def _present(plane: UInt8 | None) -> UInt8 | None:
    return plane if plane is not None and plane.size else None
