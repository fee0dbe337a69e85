"""The codec: rows of each kind <-> byte planes (before compression). Pure NumPy, deterministic bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from potstill.storage.errors import CorruptError, StoreError
from potstill.storage.rows import value_grid
from potstill.storage.rows.array_types import Int32, Int64, UInt8
from potstill.storage.rows.column import Array, Coding, Column, Values
from potstill.storage.rows.columns import misfit, stored_columns
from potstill.storage.rows.planes import Plane, join_ids, num_id_planes, split_ids
from potstill.storage.rows.row_types import ScoresRow, TokensRow
from potstill.storage.rows.scores_columns import check_scores_columns, stored_scores_columns
from potstill.storage.rows.sparse_targets import SparseTargets
from potstill.storage.rows.tokens_columns import stored_tokens_columns
from potstill.storage.store.spec import RunSpec

Planes = dict[str, UInt8]


def planes_of(spec: RunSpec) -> tuple[Plane, ...]:
    """Binary columns of a store's unit files, in file order. Raises StoreError where two have one name."""
    if spec.kind == "scores":
        names = ("label0", "label1", "label_rank", "entropy0", "entropy1")
        return (*(Plane(name, "token") for name in names), *(column.plane for column in stored_scores_columns(spec)))
    if spec.kind == "tokens":
        planes = [Plane(f"token{i}", "token") for i in range(num_id_planes(spec.vocab_size))]
        planes += [Plane("doc_lens", "document", width=4), *(column.plane for column in stored_tokens_columns(spec))]
    else:
        stored = (plane for column in stored_columns(spec) for plane in column.planes_in(spec))
        planes = [Plane("count", "token"), *stored]
    used = [plane.name for plane in planes]
    if len(set(used)) < len(used):
        twice = sorted({name for name in used if used.count(name) > 1})
        raise StoreError(f"columns share the planes {twice}; give each column a `plane` of its own")
    return tuple(planes)


def encode_targets(targets: SparseTargets, *, spec: RunSpec, rank_of_id: Int32 | None = None) -> Planes:
    """Planes of validated targets; optional columns that are absent give empty planes.

    Raises StoreError where a column is missing that the run stores.
    """
    counts = np.diff(targets.offsets).astype(np.uint8)
    coding = Coding(spec, targets.offsets, counts, rank_of_id)
    planes: Planes = {"count": counts}
    for column in stored_columns(spec):
        values, groups = targets.columns.get(column.name), column.plane_names(spec)
        if values is None and groups and not column.optional:
            raise misfit(column, spec)
        for names, array in zip(groups, _arrays(column, values, spec), strict=True):
            coded = [np.zeros(0, np.uint8)] * len(names) if array is None else column.encode(array, coding)
            planes.update(zip(names, coded, strict=True))
    return planes


def _arrays(column: Column, values: Values | None, spec: RunSpec) -> Sequence[Array | None]:
    """The arrays of a column in the order of its groups of planes."""
    if not column.per_temperature:
        return [None if isinstance(values, Mapping) else values]
    at = values if isinstance(values, Mapping) else {}
    return [at[temperature] for temperature in spec.temperatures]


def decode_targets(
    planes: Mapping[str, UInt8], *, spec: RunSpec, num_entries: int, id_of_rank: Int32 | None = None
) -> SparseTargets:
    """Inverse of encode_targets up to the grids; absent optional planes give no column. CorruptError on nonsense."""
    counts = planes["count"]
    offsets: Int64 = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    if int(offsets[-1]) != num_entries:
        raise CorruptError(f"counts sum to {int(offsets[-1])} entries, expected {num_entries}")
    coding = Coding(spec, offsets, counts, id_of_rank)
    columns: dict[str, Values] = {}
    for column in stored_columns(spec):
        groups = [[planes[name] for name in names if name in planes] for names in column.plane_names(spec)]
        if column.per_temperature:
            at = zip(spec.temperatures, groups, strict=True)
            columns[column.name] = {t: column.decode(group, coding) for t, group in at if group}
        elif groups[0] and not (column.optional and not groups[0][0].size):
            columns[column.name] = column.decode(groups[0], coding)
    return SparseTargets(offsets=offsets, columns=columns, num_draws=spec.num_draws)


def encode_tokens(rows: Sequence[TokensRow], *, spec: RunSpec) -> tuple[Planes, dict[str, Int64]]:
    """Planes of several rows joined, and bytes in each row, int64 [rows], of planes whose size tokens do not give."""
    tokens = np.concatenate([row.tokens for row in rows])
    planes = {f"token{i}": p for i, p in enumerate(split_ids(tokens, num_id_planes(spec.vocab_size)))}
    lengths = np.concatenate([row.doc_lens for row in rows]).astype("<u4")
    planes["doc_lens"] = np.frombuffer(lengths.tobytes(), np.uint8)
    sizes = {"doc_lens": np.array([4 * len(row.doc_lens) for row in rows], np.int64)}
    for column in stored_tokens_columns(spec):
        parts = [column.to_bytes(row.column(column.name)) for row in rows]
        planes[column.name] = np.concatenate(parts)
        sizes[column.name] = np.array([len(part) for part in parts], np.int64)
    return planes, sizes


def decode_tokens(planes: Mapping[str, UInt8], *, spec: RunSpec, row: int) -> TokensRow:
    """Inverse of encode_tokens for one row."""
    tokens = join_ids([planes[f"token{i}"] for i in range(num_id_planes(spec.vocab_size))])
    lengths = np.frombuffer(planes["doc_lens"].tobytes(), "<u4").astype(np.int64)
    if int(tokens.max(initial=0)) >= spec.vocab_size:
        raise CorruptError(f"token id {int(tokens.max())} is not below the vocabulary size {spec.vocab_size}")
    if not lengths.size or int(lengths.min()) < 1 or int(lengths.sum()) != len(tokens):
        raise CorruptError(f"document lengths sum to {int(lengths.sum())}, expected {len(tokens)} tokens")
    more: dict[str, Array] = {}
    for column in stored_tokens_columns(spec):
        values = column.from_bytes(planes[column.name], num_tokens=len(tokens))
        if values is not None:
            more[column.name] = values
    return TokensRow(row, tokens, lengths.astype(np.int32), more.pop("mask", None), more)


def encode_scores(rows: Sequence[ScoresRow], *, spec: RunSpec) -> tuple[Planes, dict[str, Int64]]:
    """Planes of several rows joined, and bytes in each row, int64 [rows], of planes whose size tokens do not give."""
    loss = -np.concatenate([row.label_logprob for row in rows])
    label0, label1 = value_grid.encode_fine(loss)
    entropy0, entropy1 = value_grid.encode_fine(np.concatenate([row.entropy for row in rows]))
    rank = value_grid.encode_rank(np.concatenate([row.label_rank for row in rows]))
    planes: Planes = {
        "label0": label0,
        "label1": label1,
        "label_rank": rank,
        "entropy0": entropy0,
        "entropy1": entropy1,
    }
    sizes = {}
    for column in stored_scores_columns(spec):
        parts = [column.to_bytes(row.more[column.name]) for row in rows]
        planes[column.name] = np.concatenate(parts)
        sizes[column.name] = np.array([len(part) for part in parts], np.int64)
    return planes, sizes


def decode_scores(
    planes: Mapping[str, UInt8], *, spec: RunSpec, row: int, digest: int, stats: Mapping[str, float]
) -> ScoresRow:
    """Inverse of encode_scores for one row."""
    more = {column.name: column.from_bytes(planes[column.name]) for column in stored_scores_columns(spec)}
    try:
        check_scores_columns(more, spec)
    except StoreError as error:
        raise CorruptError(str(error)) from None
    return ScoresRow(
        row=row,
        token_digest=digest,
        label_logprob=np.float32(0.0) - value_grid.decode_fine(planes["label0"], planes["label1"]),
        label_rank=planes["label_rank"].astype(np.int32),
        entropy=value_grid.decode_fine(planes["entropy0"], planes["entropy1"]),
        stats=stats,
        more=more,
    )
