"""Records of many units at once, as arrays: parsed by Arrow's JSON reader, which is strict and quick.

Nothing is judged here: where a record is not plainly right, all records of its block go through `read_record`, which
reads again, tries later generations, and says what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pa_json
from numpy.typing import NDArray

from potstill.storage.errors import CorruptError
from potstill.storage.files.checked_json import fits_checksum
from potstill.storage.files.commit import CommitRecord, is_file_of, max_record_bytes, read_record, record_name
from potstill.storage.files.folder import StoreFolder
from potstill.storage.store.spec import RunSpec
from potstill.storage.store.threads import in_threads

BLOCK_UNITS = 32
_AT_ONCE = 32
_COUNTS = pa.list_(pa.int64())
Int64 = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordBlock:
    """Readable records in unit order. Per unit [n]: `units` to `num_batches`; over all rows of these [R]: `num_tokens`,
    `num_entries`, each of `stats`; `batch_table` [B, 4] as in CommitRecord. `unreadable`: units that gave no record.
    """

    units: Int64
    files: tuple[str, ...]
    num_bytes: Int64
    digests: tuple[str, ...]
    num_targets: Int64
    num_rows: Int64
    num_batches: Int64
    num_tokens: Int64
    num_entries: Int64
    stats: Mapping[str, NDArray[np.float64]]
    batch_table: Int64
    unreadable: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, records: Sequence[CommitRecord], stats: Sequence[str], *, unreadable: Sequence[int] = ()
    ) -> RecordBlock:
        """The same of single records."""
        none = np.zeros((0, 4), np.int64)
        return cls(
            units=np.array([r.unit for r in records], np.int64),
            files=tuple(r.file for r in records),
            num_bytes=np.array([r.num_bytes for r in records], np.int64),
            digests=tuple(r.sha256 for r in records),
            num_targets=np.array([r.num_targets for r in records], np.int64),
            num_rows=np.array([len(r.num_tokens) for r in records], np.int64),
            num_batches=np.array([len(r.batch_table) for r in records], np.int64),
            num_tokens=np.concatenate([none[:, 0], *(r.num_tokens for r in records)]),
            num_entries=np.concatenate([none[:, 0], *(r.num_entries for r in records)]),
            stats={name: np.concatenate([np.zeros(0), *(r.stats[name] for r in records)]) for name in stats},
            batch_table=np.concatenate([none, *(r.batch_table for r in records)]),
            unreadable=tuple(unreadable),
        )


def read_blocks(folder: StoreFolder, spec: RunSpec, listed: Mapping[int, int]) -> Iterator[RecordBlock]:
    """The records of the `listed` units (with their numbers of generations), some at a time, in that order."""
    left = iter(listed.items())
    pieces = iter(lambda: tuple(islice(left, BLOCK_UNITS)), ())
    yield from in_threads(folder, lambda piece: _read_block(folder, spec, piece), pieces, most=_AT_ONCE)


def _read_block(folder: StoreFolder, spec: RunSpec, piece: Sequence[tuple[int, int]]) -> RecordBlock:
    found = _read_quickly(folder, spec, piece)
    if found is not None:
        return found
    read = [(unit, read_record(folder, unit, spec, generations=generations)) for unit, generations in piece]
    records = [record for _, record in read if record is not None]
    return RecordBlock.of(records, spec.stats, unreadable=[u for u, record in read if record is None])


def _read_quickly(folder: StoreFolder, spec: RunSpec, piece: Sequence[tuple[int, int]]) -> RecordBlock | None:
    """All records of a piece, or None where one of them wants a closer look."""
    bodies = []
    for unit, generations in piece:
        try:
            data = folder.read(f"units/{record_name(unit)}", max_bytes=max_record_bytes(spec))
        except CorruptError:
            return None
        if generations != 1 or data is None or not fits_checksum(data):
            return None
        bodies.append(data)
    try:
        return parse_bodies(bodies, [unit for unit, _ in piece], spec)
    except (pa.ArrowException, ValueError):  # what Arrow raises on JSON of another shape
        return None


def _schema(spec: RunSpec) -> pa.Schema:
    texts, numbers = ("fingerprint", "file", "sha256"), ("unit", "bytes", "first_row", "num_targets")
    fields = [(name, pa.string()) for name in texts] + [(name, pa.int64()) for name in numbers]
    fields += [("batches", pa.list_(_COUNTS)), ("num_tokens", _COUNTS), ("num_entries", _COUNTS)]
    fields += [("stats", pa.struct([(name, pa.list_(pa.float64())) for name in spec.stats]))]
    return pa.schema([*fields, ("time_seconds", pa.float64()), ("extra", pa.struct([]))])


def parse_bodies(bodies: Sequence[bytes], units: Sequence[int], spec: RunSpec) -> RecordBlock | None:
    """Records from their bytes, of which the checksums fit; None where one breaks a rule of `parse_record`."""
    data = b"".join(bodies)
    table = pa_json.read_json(
        pa.BufferReader(data),
        read_options=pa_json.ReadOptions(use_threads=False, block_size=len(data) + 1),
        parse_options=pa_json.ParseOptions(explicit_schema=_schema(spec), unexpected_field_behavior="ignore"),
    ).combine_chunks()
    if table.num_rows != len(units):
        return None
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    stats = [_lists(columns["stats"].field(name), np.float64) for name in spec.stats]
    tokens, entries = (_lists(columns[name], np.int64) for name in ("num_tokens", "num_entries"))
    batches = _lists(columns["batches"], None)
    fields = None if batches is None else _lists(batches.values, np.int64)
    if tokens is None or entries is None or batches is None or fields is None or None in stats:
        return None
    if any(column.null_count for column in columns.values()) or not (fields.sizes == 4).all():
        return None
    block = RecordBlock(
        units=columns["unit"].to_numpy(),
        files=tuple(columns["file"].to_pylist()),
        num_bytes=columns["bytes"].to_numpy(),
        digests=tuple(columns["sha256"].to_pylist()),
        num_targets=columns["num_targets"].to_numpy(),
        num_rows=tokens.sizes,
        num_batches=batches.sizes,
        num_tokens=tokens.values,
        num_entries=entries.values,
        stats={name: found.values for name, found in zip(spec.stats, stats, strict=True) if found is not None},
        batch_table=fields.values.reshape(-1, 4),
    )
    right = (
        set(columns["fingerprint"].to_pylist()) <= {spec.fingerprint}
        and np.array_equal(block.units, units)
        and np.array_equal(columns["first_row"].to_numpy(), block.units * spec.rows_per_unit)
        and all(np.array_equal(found.sizes, tokens.sizes) for found in (entries, *stats) if found is not None)
        and all(is_file_of(file, unit) for file, unit in zip(block.files, units, strict=True))
        and _fits(block, spec)
    )
    return block if right else None


@dataclass(frozen=True, eq=False)
class _Lists:
    sizes: Int64
    values: Any


def _lists(array: Any, dtype: type | None) -> _Lists | None:
    """Lengths and values of a list array, the latter as numpy of `dtype` or (None) as they are; None: nulls in it."""
    values = array.flatten()
    if array.null_count or values.null_count:
        return None
    sizes = np.diff(array.offsets.to_numpy()).astype(np.int64)
    return _Lists(sizes, values if dtype is None else values.to_numpy().astype(dtype, copy=False))


def _fits(block: RecordBlock, spec: RunSpec) -> bool:
    """The rules of `parse_record` for the numbers."""
    rows, tokens, entries = block.num_rows, block.num_tokens, block.num_entries
    offset, length, crc32, rows_of = block.batch_table.T
    if min(rows.min(), block.num_batches.min()) < 1 or rows.max() > spec.rows_per_unit or block.batch_table.min() < 0:
        return False
    sums = np.add.reduceat(tokens, np.cumsum(rows) - rows)
    room = np.repeat(block.num_bytes, block.num_batches)
    return bool(
        1 <= tokens.min() <= tokens.max() <= spec.row_length
        and entries.min() >= 0
        and (entries <= 255 * tokens).all()
        and block.num_bytes.min() >= 0
        and block.num_bytes.max() <= 1 << 62
        and (offset <= room).all()
        and (length <= room - offset).all()
        and max(length.max(), crc32.max()) < 1 << 32
        and np.array_equal(np.add.reduceat(rows_of, np.cumsum(block.num_batches) - block.num_batches), rows)
        and block.num_targets.min() >= 0
        and (block.num_targets <= sums).all()
        and all(np.isfinite(values).all() for values in block.stats.values())
    )
