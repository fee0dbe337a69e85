"""index.arrow: one fixed-width record per row, in crc-checked blocks of 1024 rows, read when they are asked for.

Nothing of it is mapped: what is used is the copy that was checked, and a file that is cut or changed meanwhile is an
error, not a signal that ends the process.
"""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
from numpy.typing import NDArray

from potstill.storage.errors import CorruptError
from potstill.storage.files.folder import StoreFolder
from potstill.storage.files.ipc_layout import parse_batch, parse_footer

# A row in global order costs one block read, so blocks are small; the manifest says what a store has.
ROWS_PER_BLOCK = 1024
CACHE_BYTES = 128 << 20  # of blocks that are kept; the index of 4 million rows without statistics fits
COLUMN_READ_BYTES = 4 << 20  # one read on the way through a whole column
COLUMNS = (
    ("unit", "<u4"),
    ("offset", "<u8"),
    ("length", "<u4"),
    ("crc32", "<u4"),
    ("position", "<u4"),
    ("num_tokens", "<u4"),
    ("num_entries", "<u4"),
)


class IndexBlock(NamedTuple):
    """Where one block of rows lies in index.arrow."""

    offset: int
    length: int
    crc32: int


def column_types(stats: Sequence[str]) -> list[tuple[str, str]]:
    """Names and little-endian types of all columns; statistics are float32, prefixed `stat.`."""
    return [*COLUMNS, *((f"stat.{name}", "<f4") for name in stats)]


def encode_index(columns: dict[str, NDArray[Any]], fingerprint: str) -> tuple[memoryview, list[IndexBlock]]:
    """Bytes of index.arrow (uncompressed, so that one block can be read alone) and its blocks."""
    arrays = {name: pa.array(values) for name, values in columns.items()}
    fields = [pa.field(name, array.type, False) for name, array in arrays.items()]
    schema = pa.schema(fields, metadata={"potstill.fingerprint": fingerprint})
    table = pa.Table.from_arrays(list(arrays.values()), schema=schema)
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, schema) as writer:
        writer.write_table(table, max_chunksize=ROWS_PER_BLOCK)
    data = memoryview(sink.getvalue()).cast("B")
    spans = parse_footer(data, where="index.arrow (just encoded)")
    return data, [IndexBlock(o, n, zlib.crc32(data[o : o + n])) for o, n in spans]


class RowIndex:
    """Sealed index: blocks are checked when first touched. Thread-safe, opens in time independent of its size."""

    def __init__(
        self,
        folder: StoreFolder,
        name: str,
        *,
        num_rows: int,
        num_bytes: int,
        blocks: Sequence[IndexBlock],
        rows_per_block: int,
        stats: Sequence[str],
    ) -> None:
        self._folder, self._name, self._blocks = folder, name, blocks
        self._types, self._num_rows = column_types(stats), num_rows
        self.rows_per_block = rows_per_block
        self.where = f"{folder.url}/{name}"
        found = folder.size(name)
        if found != num_bytes:
            raise CorruptError(f"{self.where}: {found} bytes, the manifest says {num_bytes}; restore it from a copy")
        self._cache: OrderedDict[int, dict[str, NDArray[Any]]] = OrderedDict()
        self._cache_blocks = max(1, CACHE_BYTES // max(1, blocks[0].length)) if blocks else 1
        self._lock = threading.Lock()

    def block(self, number: int) -> dict[str, NDArray[Any]]:
        """Columns of block `number`, read and checked against its crc32, or as they were when they were."""
        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
                return self._cache[number]
        entry = self._blocks[number]
        columns = self._parse(self._folder.read_range(self._name, entry.offset, entry.length), number)
        with self._lock:
            self._cache[number] = columns
            while len(self._cache) > self._cache_blocks:
                self._cache.popitem(last=False)
        return columns

    def column(self, name: str) -> NDArray[Any]:
        """One whole column [num_rows]; every block is read and checked, some megabytes in memory at a time."""
        found = np.empty(self._num_rows, dict(self._types)[name])
        for numbers in self._runs():
            start = self._blocks[numbers[0]].offset
            end = self._blocks[numbers[-1]].offset + self._blocks[numbers[-1]].length
            data = memoryview(self._folder.read_range(self._name, start, end - start))
            for number in numbers:
                entry = self._blocks[number]
                first = number * self.rows_per_block
                piece = data[entry.offset - start : entry.offset - start + entry.length]
                values = self._parse(piece, number)[name]
                found[first : first + len(values)] = values
        return found

    def _runs(self) -> Iterator[range]:
        """Numbers of blocks that are read together: they stand one behind the other in the file."""
        first = 0
        for number in range(1, len(self._blocks) + 1):
            if number < len(self._blocks):
                before, entry = self._blocks[number - 1], self._blocks[number]
                together = entry.offset + entry.length - self._blocks[first].offset
                if before.offset + before.length <= entry.offset and together <= COLUMN_READ_BYTES:
                    continue
            yield range(first, number)
            first = number

    def _parse(self, data: memoryview | bytes, number: int) -> dict[str, NDArray[Any]]:
        entry, first = self._blocks[number], number * self.rows_per_block
        rows, where = min(self.rows_per_block, self._num_rows - first), f"{self.where}, rows from {first}"
        if len(data) != entry.length or zlib.crc32(data) != entry.crc32:
            raise CorruptError(f"{where}: block does not fit its crc32; restore the index from a copy or seal again")
        layout = parse_batch(data, where=where, max_rows=self.rows_per_block, num_buffers=2 * len(self._types))
        if layout.num_rows != rows or layout.compressed:
            raise CorruptError(f"{where}: block holds {layout.num_rows} rows, expected {rows}")
        return {
            name: np.frombuffer(layout.buffer(2 * i + 1, num_bytes=rows * np.dtype(dtype).itemsize), dtype)
            for i, (name, dtype) in enumerate(self._types)
        }


class StatColumns(Mapping[str, "NDArray[np.float32]"]):
    """Statistics of all rows by name; a column is read when first asked for and kept."""

    def __init__(self, index: RowIndex | PartialIndex, names: Sequence[str]) -> None:
        self._index, self._names = index, tuple(names)
        self._columns: dict[str, NDArray[np.float32]] = {}

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._columns:
            column = self._index.column(f"stat.{name}").astype(np.float32, copy=False)
            column.flags.writeable = False
            self._columns[name] = column
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class PartialIndex:
    """The same interface over records in memory, for unsealed stores."""

    rows_per_block = ROWS_PER_BLOCK

    def __init__(self, columns: dict[str, NDArray[Any]]) -> None:
        self._columns = columns

    def block(self, number: int) -> dict[str, NDArray[Any]]:
        span = slice(number * ROWS_PER_BLOCK, (number + 1) * ROWS_PER_BLOCK)
        return {name: values[span] for name, values in self._columns.items()}

    def column(self, name: str) -> NDArray[Any]:
        return self._columns[name]
