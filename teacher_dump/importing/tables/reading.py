"""The reader of Parquet and Arrow files (IPC file or stream), batch by batch. First bytes say what a file is.

Arrow files are memory-mapped; of a Parquet file a few records at a time are decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc  # `pa.ipc`
import pyarrow.parquet as pq

from potstill.common.errors import UserError

_PARQUET_MAGIC, _ARROW_MAGIC = b"PAR1", b"ARROW1"
# Kinds of files, as a person is told of them.
_PARQUET, _FILE, _STREAM = "Parquet file", "Arrow file", "Arrow stream (nor Parquet, nor an Arrow file)"
# What pyarrow raises for a damaged file: of its own, of the system, and of names that are no text.
_UNREADABLE = (pa.ArrowException, OSError, EOFError, UnicodeDecodeError)


@dataclass(frozen=True)
class Batch:
    """Records from number `first` on, column by column; `share` of the file is read with their end."""

    first: int
    values: pa.RecordBatch
    share: float


@dataclass(frozen=True)
class TableRecord:
    """A record's values by column, as Arrow scalars."""

    number: int
    values: Mapping[str, Any]


def read_schema(path: Path) -> pa.Schema:
    """The Arrow schema. Raises UserError for what is no such file, and for two columns of one name."""
    kind = _kind(path)
    with _unreadable(path, f"is not a readable {kind}"):
        if kind == _PARQUET:
            with pq.ParquetFile(path) as table:
                schema = table.schema_arrow
        else:
            with _arrow(path, kind) as (schema, _):
                pass
        names = schema.names
    if len(set(names)) != len(names):
        raise UserError(f"{path} has two columns of one name among {names}; write it again with one of them")
    return schema


def count_records(path: Path) -> int:
    """Records of a file; of Arrow files the bounds of the batches are read, of Parquet files the footer."""
    kind = _kind(path)
    with _unreadable(path):
        if kind == _PARQUET:
            with pq.ParquetFile(path) as table:
                return int(table.metadata.num_rows)
        with _arrow(path, kind) as (_, batches):
            return sum(batch.num_rows for batch, _ in batches)


def read_batches(path: Path, columns: Sequence[str], *, start: int, at_once: int) -> Iterator[Batch]:
    """The batches from the one that holds record `start` on; of Parquet files of `at_once` records at most.

    Raises UserError where the file is damaged.
    """
    kind = _kind(path)
    if kind == _PARQUET:
        batches = _parquet_batches(path, columns, start, at_once)
    else:
        batches = _arrow_batches(path, kind, columns, start)
    while True:
        with _unreadable(path):
            found = next(batches, None)
            if found is not None:
                found.values.validate(full=True)  # offsets of a damaged file would lead outside its buffers
        if found is None:
            return
        yield found


def read_records(path: Path, columns: Sequence[str], *, start: int, at_once: int) -> Iterator[TableRecord]:
    """Records from number `start` on. Raises UserError where the file is damaged."""
    for batch in read_batches(path, columns, start=start, at_once=at_once):
        arrays = {name: batch.values.column(name) for name in columns}
        for line in range(max(0, start - batch.first), batch.values.num_rows):
            yield TableRecord(batch.first + line, {name: array[line] for name, array in arrays.items()})


@contextmanager
def _unreadable(path: Path, problem: str = "cannot be read to its end") -> Iterator[None]:
    """Errors of a damaged file as UserError."""
    try:
        yield
    except _UNREADABLE as error:
        raise UserError(f"{path} {problem}: {error}; restore it") from error


def _kind(path: Path) -> str:
    with _unreadable(path, "cannot be read"), path.open("rb") as stream:
        head = stream.read(max(len(_PARQUET_MAGIC), len(_ARROW_MAGIC)))
    return _PARQUET if head.startswith(_PARQUET_MAGIC) else _FILE if head == _ARROW_MAGIC else _STREAM


@contextmanager
def _arrow(path: Path, kind: str) -> Iterator[tuple[pa.Schema, Iterator[tuple[pa.RecordBatch, float]]]]:
    """The schema of an Arrow file or stream, and its batches, each with the share of the file up to its end."""
    # Not mapped: a file that is cut meanwhile would end the process with SIGBUS.
    with pa.OSFile(str(path)) as source:
        if kind == _FILE:
            with pa.ipc.open_file(source) as reader:
                total = reader.num_record_batches
                yield reader.schema, ((reader.get_batch(number), (number + 1) / total) for number in range(total))
        else:
            with pa.ipc.open_stream(source) as reader:
                yield reader.schema, ((batch, min(source.tell() / source.size(), 1.0)) for batch in reader)


def _arrow_batches(path: Path, kind: str, columns: Sequence[str], start: int) -> Iterator[Batch]:
    with _arrow(path, kind) as (_, batches):
        first = 0
        for batch, share in batches:
            if first + batch.num_rows > start:
                yield Batch(first, batch.select(list(columns)), share)
            first += batch.num_rows


def _parquet_batches(path: Path, columns: Sequence[str], start: int, at_once: int) -> Iterator[Batch]:
    with pq.ParquetFile(path) as table:
        first, total = 0, max(table.metadata.num_rows, 1)
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if first + rows <= start:
                first += rows
                continue
            for batch in table.iter_batches(at_once, row_groups=[group], columns=list(columns)):
                if first + batch.num_rows > start:
                    yield Batch(first, batch, (first + batch.num_rows) / total)
                first += batch.num_rows
