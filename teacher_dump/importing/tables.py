"""Tables with a list column of ids: Parquet, Arrow files and streams, the shards of a folder of save_to_disk.

Lists are taken as flat values and offsets, a few records at a time; Arrow files are memory-mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from potstill.common.errors import UserError
from potstill.teacher_dump.importing.columns import Columns, choose_columns, make_record
from potstill.teacher_dump.importing.token_file import Ids, Reading, TokenFile, TokenRecord, file_size, read_bytes
from potstill.teacher_dump.records.base import BadRecord

_BATCH_RECORDS = 64
_PARQUET_MAGIC, _ARROW_MAGIC = b"PAR1", b"ARROW1"
# What pyarrow raises for a damaged file: of its own, of the system, and of names that are no text.
_UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)

# (number of the first record, batch, share of the file up to its end), from the batch that holds record `skip` on
Batches = Iterator[tuple[int, pa.RecordBatch, float]]


@dataclass(frozen=True)
class TableFile:
    """A TokenFile over one table; `batches(path, columns, skip)` reads it."""

    paths: tuple[Path, ...]
    columns: Columns
    reading: Reading
    facts: Mapping[str, Any]
    batches: Callable[[Path, list[str], int], Batches]
    hints: tuple[str, ...] = field(default=())
    word: str = "row"

    @property
    def has_mask(self) -> bool:
        return self.columns.mask is not None

    def records(self, skip: int) -> Iterator[TokenRecord]:
        """The rows from number `skip` on."""
        path, num_bytes = self.paths[0], file_size(self.paths[0])
        batches = self.batches(path, self.columns.names, skip)
        while True:
            try:
                found = next(batches, None)
                if found is None:
                    return
                first, batch, share = found
                batch.validate(full=True)  # offsets of a damaged file would lead outside its buffers
            except _UNREADABLE as error:
                raise UserError(f"{path} cannot be read to its end: {error}; restore it") from error
            yield from self._records(first, batch, max(skip - first, 0), int(share * num_bytes))

    def _records(self, first: int, batch: pa.RecordBatch, skip: int, position: int) -> Iterator[TokenRecord]:
        names = {"ids": self.columns.ids, "flags": self.columns.mask, "attention": self.columns.attention}
        lists = {key: _Lists(batch.column(name)) for key, name in names.items() if name is not None}
        for row in range(skip, batch.num_rows):
            values = {key: column[row] for key, column in lists.items()}
            yield make_record(first + row, position, self.columns, self.reading, **values)


class _Lists:
    """A list column: `self[row]` is the numbers of that row, or why there are none."""

    def __init__(self, column: pa.Array) -> None:
        self._nulls = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None
        if pa.types.is_fixed_size_list(column.type):
            size = column.type.list_size
            self._offsets = (np.arange(len(column) + 1, dtype=np.int64) + column.offset) * size
        else:
            self._offsets = column.offsets.to_numpy()
        values = column.values
        self._holes = None
        if values.null_count:
            self._holes = values.is_null().to_numpy(zero_copy_only=False)
            values = values.fill_null(0)
        self._values = values.to_numpy(zero_copy_only=False)

    def __getitem__(self, row: int) -> Ids | BadRecord:
        if self._nulls is not None and self._nulls[row]:
            return BadRecord("is null, expected a list")
        here = slice(int(self._offsets[row]), int(self._offsets[row + 1]))
        if self._holes is not None and self._holes[here].any():
            return BadRecord(f"is null at token {int(np.argmax(self._holes[here]))}, expected a number")
        return self._values[here]


def open_file(path: Path, reading: Reading) -> TokenFile:
    """Open a table. Raises UserError where it is none, or has no list column of integers."""
    head = read_bytes(path, 8)
    kind = _PARQUET if head.startswith(_PARQUET_MAGIC) else _FILE if head.startswith(_ARROW_MAGIC) else _STREAM
    schema_of, batches, name = kind
    try:
        schema = schema_of(path)
        names = schema.names
    except _UNREADABLE as error:
        raise UserError(f"{path} is not a readable {name}: {error}") from error
    if len(set(names)) != len(names):
        raise UserError(f"{path} has two columns of one name among {names}; write it again with one of them")
    columns = choose_columns(names, reading, where=str(path))
    for column in columns.names:
        _check_type(path, column, schema.field(column).type, is_mask=column == columns.mask)
    facts = {"dtype": str(schema.field(columns.ids).type.value_type), **columns.facts(reading)}
    return TableFile((path,), columns, reading, facts, batches, columns.hints(names))


def _check_type(path: Path, column: str, found: pa.DataType, *, is_mask: bool) -> None:
    types = pa.types
    is_list = types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)
    inner = found.value_type if is_list else None
    if inner is None or not (types.is_integer(inner) or (is_mask and types.is_boolean(inner))):
        raise UserError(
            f"{path}: column {column!r} is {found}, expected a list of integers; name another (--ids-column, "
            "--mask-column, --attention-column)"
        )


def _parquet_schema(path: Path) -> pa.Schema:
    with pq.ParquetFile(path) as table:
        return table.schema_arrow


def _parquet_batches(path: Path, columns: list[str], skip: int) -> Batches:
    with pq.ParquetFile(path) as table:
        first, total = 0, max(table.metadata.num_rows, 1)
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if first + rows <= skip:
                first += rows
                continue
            for batch in table.iter_batches(_BATCH_RECORDS, row_groups=[group], columns=columns):
                if first + batch.num_rows > skip:
                    yield first, batch, (first + batch.num_rows) / total
                first += batch.num_rows


def _file_schema(path: Path) -> pa.Schema:
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
        return reader.schema


def _file_batches(path: Path, columns: list[str], skip: int) -> Batches:
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
        numbers = range(reader.num_record_batches)
        yield from _whole_batches((reader.get_batch(number) for number in numbers), source, columns, skip)


def _stream_schema(path: Path) -> pa.Schema:
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        return reader.schema


def _stream_batches(path: Path, columns: list[str], skip: int) -> Batches:
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        yield from _whole_batches(iter(reader), source, columns, skip)


def _whole_batches(batches: Iterator[pa.RecordBatch], source: Any, columns: list[str], skip: int) -> Batches:
    first, size = 0, max(source.size(), 1)
    for batch in batches:
        if first + batch.num_rows > skip:
            yield first, batch.select(columns), min(source.tell() / size, 1.0)
        first += batch.num_rows


_PARQUET = (_parquet_schema, _parquet_batches, "Parquet file")
_FILE = (_file_schema, _file_batches, "Arrow file")
_STREAM = (_stream_schema, _stream_batches, "Arrow stream (nor Parquet, nor an Arrow file)")
