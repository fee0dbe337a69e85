"""Unit files: rows <-> an Arrow IPC file (zstd level 1) of byte planes, some rows to a record batch."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
from numpy.typing import NDArray

from potstill.storage.errors import CorruptError, StoreError
from potstill.storage.files.ipc_layout import BatchLayout, parse_batch, parse_footer
from potstill.storage.rows.codec import (
    Planes,
    decode_scores,
    decode_targets,
    decode_tokens,
    encode_scores,
    encode_targets,
    encode_tokens,
    planes_of,
)
from potstill.storage.rows.id_map import IdMap
from potstill.storage.rows.planes import Plane, PlaneAxis, bit_bytes
from potstill.storage.rows.row_types import Row, ScoresRow, TargetsRow, TokensRow, token_digest
from potstill.storage.rows.sparse_targets import SparseTargets, concatenate
from potstill.storage.store.spec import RunSpec

TOKENS_PER_BATCH = 8192
# Before compression. A row that is read alone costs the whole batch that it lies in; a batch of its own makes it longer
# by about 1.2 kB of headers and of what zstd starts anew, which is below 1 % from this size on.
FULL_BATCH_BYTES = 192 << 10
MAX_BATCH_ROWS = TOKENS_PER_BATCH
HEAD_COLUMNS = (("row", 8), ("token_digest", 8), ("num_tokens", 4), ("num_entries", 4))
NUM_HEAD_BUFFERS = 2 * (len(HEAD_COLUMNS) + 1)


@dataclass(frozen=True)
class BatchEntry:
    """One record batch inside a unit file: message bytes [offset, offset+length), their crc32, rows in it."""

    offset: int
    length: int
    crc32: int
    num_rows: int


@dataclass(frozen=True)
class EncodedUnit:
    """A unit file in memory and what its commit record says about it."""

    data: memoryview
    sha256: str
    batches: tuple[BatchEntry, ...]
    num_tokens: tuple[int, ...]
    num_entries: tuple[int, ...]
    num_targets: int


def row_sizes(row: Row) -> tuple[int, int]:
    """(tokens, entries) of a row of any kind."""
    if isinstance(row, TokensRow):
        return len(row.tokens), 0
    if isinstance(row, ScoresRow):
        return len(row.label_logprob), 0
    return row.targets.num_tokens, row.targets.num_entries


def group_rows(sizes: Sequence[tuple[int, int]], planes: Sequence[Plane]) -> list[range]:
    """Cut rows of these (tokens, entries) into batches of at most TOKENS_PER_BATCH tokens (a longer row stands alone).

    A batch that holds FULL_BATCH_BYTES takes no further row: a row of many entries stands alone, and is read alone.
    """
    of_token, of_entry = (sum(p.width for p in planes if p.axis == axis) for axis in ("token", "entry"))
    groups, start, total, num_bytes = [], 0, 0, 0
    for i, (tokens, entries) in enumerate(sizes):
        if i > start and (total + tokens > TOKENS_PER_BATCH or num_bytes >= FULL_BATCH_BYTES):
            groups.append(range(start, i))
            start, total, num_bytes = i, 0, 0
        total += tokens
        num_bytes += of_token * tokens + of_entry * entries
    return [*groups, range(start, len(sizes))] if sizes else []


def arrow_schema(spec: RunSpec, unit: int) -> pa.Schema:
    """Columns of a unit file; the metadata ties the file to its run."""
    planes = planes_of(spec)
    head = [pa.field(name, pa.uint64() if width == 8 else pa.uint32(), False) for name, width in HEAD_COLUMNS]
    crc = pa.field("crc32", pa.binary(4 * len(planes)), False)
    metadata = {"potstill.fingerprint": spec.fingerprint, "potstill.kind": spec.kind, "potstill.unit": str(unit)}
    return pa.schema([*head, crc, *(pa.field(p.name, pa.binary(), False) for p in planes)], metadata=metadata)


def encode_unit(rows: Sequence[Row], *, spec: RunSpec, unit: int, id_map: IdMap | None) -> EncodedUnit:
    """Encode validated rows of one kind; equal input gives equal bytes."""
    schema = arrow_schema(spec, unit)
    sizes = [row_sizes(row) for row in rows]
    sink = pa.BufferOutputStream()
    options = ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1), use_threads=False)
    layout = planes_of(spec)
    groups = group_rows(sizes, layout)
    with ipc.new_file(sink, schema, options=options) as writer:
        for group in groups:
            columns = _encode_batch([rows[i] for i in group], spec=spec, id_map=id_map, layout=layout)
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    data = memoryview(sink.getvalue()).cast("B")
    blocks = parse_footer(data, where=f"unit {unit} (just encoded)")
    batches = tuple(
        BatchEntry(offset, length, zlib.crc32(data[offset : offset + length]), len(group))
        for (offset, length), group in zip(blocks, groups, strict=True)
    )
    num_targets = sum(
        int(np.count_nonzero(np.diff(row.targets.offsets))) for row in rows if isinstance(row, TargetsRow)
    )
    return EncodedUnit(
        data=data,
        sha256=hashlib.sha256(data).hexdigest(),
        batches=batches,
        num_tokens=tuple(tokens for tokens, _ in sizes),
        num_entries=tuple(entries for _, entries in sizes),
        num_targets=num_targets,
    )


def _encode_batch(
    rows: Sequence[Row], *, spec: RunSpec, id_map: IdMap | None, layout: Sequence[Plane]
) -> list[pa.Array]:
    if spec.kind == "tokens":
        token_rows = cast("Sequence[TokensRow]", rows)
        digests = [token_digest(row.tokens, row.doc_lens) for row in token_rows]
        planes, plane_sizes = encode_tokens(token_rows, spec=spec)
    elif spec.kind == "scores":
        scores_rows = cast("Sequence[ScoresRow]", rows)
        digests = [row.token_digest for row in scores_rows]
        planes, plane_sizes = encode_scores(scores_rows, spec=spec)
    else:
        targets_rows = cast("Sequence[TargetsRow]", rows)
        digests = [row.token_digest for row in targets_rows]
        joined: SparseTargets = concatenate([row.targets for row in targets_rows])
        rank_of_id = None if id_map is None else id_map.rank_of_id
        planes, plane_sizes = encode_targets(joined, spec=spec, rank_of_id=rank_of_id), {}
    sizes = np.array([row_sizes(row) for row in rows], np.int64).reshape(-1, 2)
    counts = {"token": sizes[:, 0], "entry": sizes[:, 1], "row": np.ones(len(rows), np.int64)}
    bounds = {p.name: _bounds(p, counts, plane_sizes.get(p.name), len(planes[p.name])) for p in layout}
    checks = b"".join(
        zlib.crc32(planes[p.name].data[bounds[p.name][i] : bounds[p.name][i + 1]]).to_bytes(4, "little")
        for i in range(len(rows))
        for p in layout
    )
    heads = [
        pa.array([row.row for row in rows], pa.uint64()),
        pa.array(digests, pa.uint64()),
        pa.array(sizes[:, 0].astype(np.uint32)),
        pa.array(sizes[:, 1].astype(np.uint32)),
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(4 * len(layout)), len(rows), [None, pa.py_buffer(checks)]),
    ]
    return heads + [_binary_array(planes[p.name], bounds[p.name]) for p in layout]


def _bounds(
    plane: Plane, counts: Mapping[str, NDArray[np.int64]], sizes: NDArray[np.int64] | None, num_bytes: int
) -> NDArray[np.int64]:
    """Where the plane of each row begins, and the end, [rows + 1]; `sizes`: its bytes in each row, where known."""
    bounds = np.zeros(len(counts["row"]) + 1, np.int64)
    if sizes is not None:
        np.cumsum(sizes, out=bounds[1:])
    elif not (plane.optional and num_bytes == 0):
        np.cumsum(counts[plane.axis] * plane.width, out=bounds[1:])
    assert int(bounds[-1]) == num_bytes, (plane.name, int(bounds[-1]), num_bytes)
    if num_bytes >= 1 << 31:
        raise StoreError(
            f"plane {plane.name} of one batch is {num_bytes} bytes, the format holds 2 GiB; use shorter rows"
        )
    return bounds


def _binary_array(data: NDArray[np.uint8], bounds: NDArray[np.int64]) -> pa.Array:
    offsets = pa.py_buffer(bounds.astype("<i4").tobytes())
    return pa.BinaryArray.from_buffers(pa.binary(), len(bounds) - 1, [None, offsets, pa.py_buffer(data)])


class DecodedBatch:
    """One record batch: head columns parsed at once, planes decompressed on demand and cut by row."""

    def __init__(
        self, message: bytes | memoryview, *, spec: RunSpec, where: str, layout: Sequence[Plane] | None = None
    ) -> None:
        """`message` must have passed its crc; CorruptError on any inconsistency.

        layout: `planes_of` the spec, where that is known already; of a batch of one row it is a tenth of the work.
        """
        self.spec, self.where = spec, where
        self._layout_planes = planes_of(spec) if layout is None else layout
        num_buffers = NUM_HEAD_BUFFERS + 3 * len(self._layout_planes)
        self._layout: BatchLayout = parse_batch(message, where=where, max_rows=MAX_BATCH_ROWS, num_buffers=num_buffers)
        if len(self._layout.buffers) != num_buffers:
            raise CorruptError(f"{where}: batch has {len(self._layout.buffers)} buffers, expected {num_buffers}")
        num_rows = self._layout.num_rows
        heads = [
            np.frombuffer(self._layout.buffer(2 * i + 1, num_bytes=num_rows * width), f"<u{width}")
            for i, (_, width) in enumerate(HEAD_COLUMNS)
        ]
        self.rows, self.digests, self.num_tokens, self.num_entries = heads
        crc_bytes = self._layout.buffer(NUM_HEAD_BUFFERS - 1, num_bytes=num_rows * 4 * len(self._layout_planes))
        self._crc = np.frombuffer(crc_bytes, "<u4").reshape(num_rows, len(self._layout_planes))
        if num_rows and (
            int(self.num_tokens.max()) > spec.row_length
            or (self.num_entries > self.num_tokens.astype(np.int64) * 255).any()
        ):
            raise CorruptError(f"{where}: batch declares rows longer than the row length {spec.row_length}")
        self._most = self._most_places()
        self._planes: dict[str, tuple[memoryview, NDArray[np.int32]]] = {}

    def _plane(self, index: int) -> tuple[memoryview, NDArray[np.int32]]:
        plane = self._layout_planes[index]
        if plane.name not in self._planes:
            first = NUM_HEAD_BUFFERS + 3 * index
            offset_bytes = self._layout.buffer(first + 1, num_bytes=4 * (self._layout.num_rows + 1))
            bounds = np.frombuffer(offset_bytes, "<i4")
            limit = self._most[plane.axis] * plane.width
            if bounds[0] != 0 or int(bounds[-1]) > limit or not (bounds[:-1] <= bounds[1:]).all():
                raise CorruptError(f"{self.where}: offsets of plane {plane.name} are damaged")
            self._planes[plane.name] = self._layout.buffer(first + 2, num_bytes=int(bounds[-1])), bounds
        return self._planes[plane.name]

    def _most_places(self) -> dict[PlaneAxis, int]:
        """Most places that the rows of this batch have on each axis; once for all planes, as a batch may be one row."""
        num_tokens = int(self.num_tokens.sum(dtype=np.int64))
        return {
            "row": len(self.rows),
            "entry": int(self.num_entries.sum(dtype=np.int64)),
            "bit": int(bit_bytes(self.num_tokens.astype(np.int64)).sum()),
            "token": num_tokens,
            "document": num_tokens,  # no more than tokens
        }

    def column_bytes(self) -> dict[str, int]:
        """Compressed bytes of each plane in this batch."""
        first = [NUM_HEAD_BUFFERS + 3 * index for index in range(len(self._layout_planes))]
        return {
            plane.name: sum(length for _, length in self._layout.buffers[i : i + 3])
            for i, plane in zip(first, self._layout_planes, strict=True)
        }

    def planes(self, position: int, *, skip: Collection[str] = ()) -> Planes:
        """Decompressed planes of one row, each checked against its size and its crc32."""
        out: Planes = {}
        tokens, entries = int(self.num_tokens[position]), int(self.num_entries[position])
        counts = {"token": tokens, "bit": bit_bytes(tokens), "entry": entries, "row": 1}
        for index, plane in enumerate(self._layout_planes):
            if plane.skip is not None and plane.skip in skip:
                continue
            data, bounds = self._plane(index)
            piece = data[int(bounds[position]) : int(bounds[position + 1])]
            wanted = counts.get(plane.axis, -1) * plane.width
            if plane.axis != "document" and len(piece) != wanted and not (plane.optional and not len(piece)):
                raise CorruptError(f"{self.where}: plane {plane.name} has {len(piece)} bytes, expected {wanted}")
            if plane.axis == "document" and len(piece) % plane.width:
                raise CorruptError(f"{self.where}: plane {plane.name} has {len(piece)} bytes, not a multiple of 4")
            if zlib.crc32(piece) != int(self._crc[position, index]):
                raise CorruptError(f"{self.where}: plane {plane.name} does not fit its crc32")
            out[plane.name] = np.frombuffer(piece, np.uint8)
        return out

    def decode(
        self,
        position: int,
        *,
        row: int,
        stats: Mapping[str, float],
        id_map: IdMap | None,
        skip: Collection[str] = (),
    ) -> Row:
        """Row at `position`, which must carry the number `row`."""
        if position >= len(self.rows) or int(self.rows[position]) != row:
            found: Any = int(self.rows[position]) if position < len(self.rows) else "nothing"
            raise CorruptError(f"{self.where}: batch carries row {found}, expected row {row}")
        planes, digest = self.planes(position, skip=skip), int(self.digests[position])
        try:
            if self.spec.kind == "tokens":
                tokens = decode_tokens(planes, spec=self.spec, row=row)
                if token_digest(tokens.tokens, tokens.doc_lens) != digest:
                    raise CorruptError("tokens do not fit their token digest")
                return tokens
            if self.spec.kind == "scores":
                return decode_scores(planes, spec=self.spec, row=row, digest=digest, stats=stats)
            targets = decode_targets(
                planes,
                spec=self.spec,
                num_entries=int(self.num_entries[position]),
                id_of_rank=None if id_map is None else id_map.id_of_rank,
            )
        except CorruptError as error:
            raise CorruptError(f"{self.where}: {error}") from None
        return TargetsRow(row, digest, targets, stats)
