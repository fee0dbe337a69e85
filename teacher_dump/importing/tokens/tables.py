"""Tables with a list column of ids: Parquet, Arrow files and streams, the shards of a folder of save_to_disk.

Lists are taken as flat values and offsets, a few records at a time; Arrow files are memory-mapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from potstill.common.errors import UserError
from potstill.teacher_dump.importing.tables.reading import read_batches, read_schema
from potstill.teacher_dump.importing.tokens.base import Ids, Reading, TokenFile, TokenRecord, file_size
from potstill.teacher_dump.importing.tokens.columns import Columns, choose_columns, make_record
from potstill.teacher_dump.records.base import BadRecord

_BATCH_RECORDS = 64


@dataclass(frozen=True)
class TableFile:
    """A TokenFile over one table."""

    paths: tuple[Path, ...]
    columns: Columns
    reading: Reading
    facts: Mapping[str, Any]
    hints: tuple[str, ...] = field(default=())
    word: str = "row"

    @property
    def has_mask(self) -> bool:
        return self.columns.mask is not None

    def records(self, skip: int) -> Iterator[TokenRecord]:
        """The rows from number `skip` on."""
        path, num_bytes = self.paths[0], file_size(self.paths[0])
        for found in read_batches(path, self.columns.names, start=skip, at_once=_BATCH_RECORDS):
            begin = max(skip - found.first, 0)
            yield from self._records(found.first, found.values, begin, int(found.share * num_bytes))

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
            values = values.fill_null(False if pa.types.is_boolean(values.type) else 0)
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
    schema = read_schema(path)
    names = schema.names
    columns = choose_columns(names, reading, where=str(path))
    for column in columns.names:
        _check_type(path, column, schema.field(column).type, is_mask=column == columns.mask)
    facts = {"dtype": str(schema.field(columns.ids).type.value_type), **columns.facts(reading)}
    return TableFile((path,), columns, reading, facts, columns.hints(names))


def _check_type(path: Path, column: str, found: pa.DataType, *, is_mask: bool) -> None:
    types = pa.types
    is_list = types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)
    inner = found.value_type if is_list else None
    if inner is None or not (types.is_integer(inner) or (is_mask and types.is_boolean(inner))):
        raise UserError(
            f"{path}: column {column!r} is {found}, expected a list of integers; name another (--ids-column, "
            "--mask-column, --attention-column)"
        )
