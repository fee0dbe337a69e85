"""index.arrow: one fixed-width record per row, in crc-checked blocks of 1024 rows, memory-mapped and read lazily."""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
from numpy.typing import NDArray

from potstill.storage.errors import CorruptError
from potstill.storage.files.commit import CommitRecord
from potstill.storage.files.folder import StoreFolder
from potstill.storage.files.ipc_layout import parse_batch, parse_footer

# A row in global order costs one block read, so blocks are small; the manifest says what a store has.
ROWS_PER_BLOCK = 1024
BLOCK_CACHE = 2048
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


def build_columns(records: Iterable[CommitRecord], stats: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Whole index columns from the records in unit order."""
    types = column_types(stats)
    parts: dict[str, list[NDArray[Any]]] = {name: [np.zeros(0, t)] for name, t in types}
    for record in records:
        rows_of = np.array([batch.num_rows for batch in record.batches])
        starts = np.cumsum(rows_of) - rows_of
        values = {
            "unit": np.full(len(record.num_tokens), record.unit),
            "offset": np.repeat([batch.offset for batch in record.batches], rows_of),
            "length": np.repeat([batch.length for batch in record.batches], rows_of),
            "crc32": np.repeat([batch.crc32 for batch in record.batches], rows_of),
            "position": np.arange(len(record.num_tokens)) - np.repeat(starts, rows_of),
            "num_tokens": record.num_tokens,
            "num_entries": record.num_entries,
            **{f"stat.{name}": record.stats[name] for name in stats},
        }
        for name, dtype in types:
            parts[name].append(np.asarray(values[name]).astype(dtype))
    return {name: np.concatenate(parts[name]) for name, _ in types}


def encode_index(columns: dict[str, NDArray[Any]], fingerprint: str) -> tuple[memoryview, list[IndexBlock]]:
    """Bytes of index.arrow (uncompressed, so that blocks can be mapped) and its blocks."""
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
        self._map = folder.map(name, num_bytes)
        self._cache: OrderedDict[int, dict[str, NDArray[Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def block(self, number: int) -> dict[str, NDArray[Any]]:
        """Columns of block `number`, verified against its crc32."""
        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
                return self._cache[number]
        entry = self._blocks[number]
        if self._map is not None:
            data: memoryview | bytes = self._map[entry.offset : entry.offset + entry.length]
        else:
            data = self._folder.read_range(self._name, entry.offset, entry.length)
        first = number * self.rows_per_block
        rows = min(self.rows_per_block, self._num_rows - first)
        columns = self._parse(data, entry, rows, f"{self.where}, rows from {first}")
        with self._lock:
            self._cache[number] = columns
            # Mapped blocks are views into the page cache and cost next to nothing; fetched ones are bounded.
            while self._map is None and len(self._cache) > BLOCK_CACHE:
                self._cache.popitem(last=False)
        return columns

    def _parse(self, data: memoryview | bytes, entry: IndexBlock, rows: int, where: str) -> dict[str, NDArray[Any]]:
        if len(data) != entry.length or zlib.crc32(data) != entry.crc32:
            raise CorruptError(f"{where}: block does not fit its crc32; restore the index from a copy or seal again")
        layout = parse_batch(data, where=where, max_rows=self.rows_per_block, num_buffers=2 * len(self._types))
        if layout.num_rows != rows or layout.compressed:
            raise CorruptError(f"{where}: block holds {layout.num_rows} rows, expected {rows}")
        return {
            name: np.frombuffer(layout.buffer(2 * i + 1, num_bytes=rows * np.dtype(dtype).itemsize), dtype)
            for i, (name, dtype) in enumerate(self._types)
        }

    def column(self, name: str) -> NDArray[Any]:
        """One whole column [num_rows]; touches every block."""
        parts = [self.block(i)[name] for i in range(len(self._blocks))]
        dtype = dict(self._types)[name]
        return np.concatenate([np.zeros(0, dtype), *parts])


class StatColumns(Mapping[str, "NDArray[np.float32]"]):
    """Statistics of all rows by name; a column is read when first asked for and kept."""

    def __init__(self, index: RowIndex | PartialIndex, names: Sequence[str]) -> None:
        self._index, self._names = index, tuple(names)
        self._columns: dict[str, NDArray[np.float32]] = {}

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._columns:
            column = self._index.column(f"stat.{name}").astype(np.float32)
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
