"""index.arrow: one fixed-width record per row, in crc-checked blocks of 1024 rows, read when they are asked for.

Nothing of it is mapped: what is used is the copy that was checked, and a file that is cut or changed meanwhile is an
error, not a signal that ends the process. A remote one is read from a copy on the node where there is a place for it
(index_copy.py), and whole columns are shared by the processes of the node (shared_arrays.py).
"""

from __future__ import annotations

import logging
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
from numpy.typing import NDArray

from potstill.storage.errors import CorruptError, GaveUpError, ReadFailedError
from potstill.storage.files.folder import StoreFolder
from potstill.storage.files.ipc_layout import parse_batch, parse_footer
from potstill.storage.files.node_folder import NodeFolder
from potstill.storage.files.shared_arrays import Add, shared_arrays, shared_from
from potstill.storage.store.index_copy import IndexCopy, copy_of_index
from potstill.storage.store.threads import in_threads

logger = logging.getLogger(__name__)

# A row in global order costs one block read, so blocks are small; the manifest says what a store has.
ROWS_PER_BLOCK = 1024
CACHE_BYTES = 128 << 20  # of blocks that are kept; the index of 4 million rows without statistics fits
# Where a miss is a read of a local file, less is kept: each rank has a cache of its own for each of its stores.
LOCAL_CACHE_BYTES = 32 << 20
COLUMN_READ_BYTES = 4 << 20  # one read on the way through a whole column; a remote index of that size is read at once
FAR_READ_BYTES, FAR_READS = 16 << 20, 8  # of a remote one without a copy: one read, and how many at once
_STATS_VERSION = 1  # of what lies in shared files
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
        self._types, self.num_rows, self._num_bytes = column_types(stats), num_rows, num_bytes
        self.rows_per_block = rows_per_block
        self.where = f"{folder.url}/{name}"
        self._is_remote = folder.parallel_reads > 1
        # A remote one says so with the first rows that are read of it: a request less for each of a thousand ranks.
        found = num_bytes if self._is_remote else folder.size(name)
        if found != num_bytes:
            raise CorruptError(f"{self.where}: {found} bytes, the manifest says {num_bytes}; restore it from a copy")
        self._cache: OrderedDict[int, dict[str, NDArray[Any]]] = OrderedDict()
        self._lock = threading.Lock()
        self._make_copy: Callable[[], IndexCopy | None] | None = None
        self._copy: IndexCopy | None = None
        self._copy_lock = threading.Lock()

    def keep_copy(self, node: NodeFolder, sha256: str) -> None:
        """Read a copy on the node from now on, if the index is remote and large; it is made at the first read."""
        if self._is_remote and self._num_bytes > COLUMN_READ_BYTES:
            folder, name = self._folder, self._name
            self._make_copy = partial(copy_of_index, node, folder, name, num_bytes=self._num_bytes, sha256=sha256)

    def block(self, number: int) -> dict[str, NDArray[Any]]:
        """Columns of block `number`, read and checked against its crc32, or as they were when they were."""
        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
                return self._cache[number]
        numbers = range(number, number + 1)
        if self._is_remote and self._num_bytes <= COLUMN_READ_BYTES:
            numbers = next(run for run in self._runs(COLUMN_READ_BYTES) if number in run)
        blocks = self._read(numbers)
        with self._lock:
            for place, columns in zip(numbers, blocks, strict=True):
                self._cache[place] = columns
            while len(self._cache) > max(self._most_blocks(), len(numbers)):
                self._cache.popitem(last=False)
        return blocks[number - numbers.start]

    def _most_blocks(self) -> int:
        is_near = not self._is_remote or self._copy is not None
        return max(1, (min(CACHE_BYTES, LOCAL_CACHE_BYTES) if is_near else CACHE_BYTES) // self._blocks[0].length)

    def column(self, name: str) -> NDArray[Any]:
        """One whole column [num_rows], as `columns` gives it."""
        return self.columns([name])[name]

    def columns(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Whole columns [num_rows] in one pass: every block is read and checked, some megabytes in memory at a time."""
        types = dict(self._types)
        found = {name: np.empty(self.num_rows, types[name]) for name in names}
        for numbers, blocks in self._passes():
            for number, columns in zip(numbers, blocks, strict=True):
                first = number * self.rows_per_block
                for name, values in found.items():
                    values[first : first + len(columns[name])] = columns[name]
        return found

    def _passes(self) -> Iterator[tuple[range, list[dict[str, NDArray[Any]]]]]:
        """All blocks, in runs that are read together; of a remote file several side by side."""
        if self._is_remote and self._near() is None:
            runs = list(self._runs(FAR_READ_BYTES))
            yield from zip(runs, in_threads(self._folder, self._read, runs, most=FAR_READS), strict=True)
        else:
            for numbers in self._runs(COLUMN_READ_BYTES):
                yield numbers, self._read(numbers)

    def _runs(self, most_bytes: int) -> Iterator[range]:
        """Numbers of blocks that are read together: they stand one behind the other in the file."""
        first = 0
        for number in range(1, len(self._blocks) + 1):
            if number < len(self._blocks):
                before, entry = self._blocks[number - 1], self._blocks[number]
                together = entry.offset + entry.length - self._blocks[first].offset
                if before.offset + before.length <= entry.offset and together <= most_bytes:
                    continue
            yield range(first, number)
            first = number

    def _near(self) -> IndexCopy | None:
        """The copy on this node; the first thread that asks makes it."""
        with self._copy_lock:
            if self._make_copy is not None:
                self._copy, self._make_copy = self._make_copy(), None
            return self._copy

    def _read(self, numbers: range) -> list[dict[str, NDArray[Any]]]:
        """Columns of blocks that stand one behind the other, each checked."""
        start = self._blocks[numbers[0]].offset
        length = self._blocks[numbers[-1]].offset + self._blocks[numbers[-1]].length - start
        copy = self._near()
        if copy is not None:
            try:
                return self._parse_all(copy.read(start, length), numbers)
            except GaveUpError:
                raise
            except (CorruptError, ReadFailedError) as error:
                logger.warning("%s is a copy of the index no more (%s); the store is asked instead", copy.where, error)
                with self._copy_lock:
                    self._copy = None
                copy.remove()
        return self._parse_all(self._folder.read_range(self._name, start, length), numbers)

    def _parse_all(self, data: bytes, numbers: range) -> list[dict[str, NDArray[Any]]]:
        view, start = memoryview(data), self._blocks[numbers[0]].offset
        entries = ((number, self._blocks[number]) for number in numbers)
        return [self._parse(view[b.offset - start : b.offset - start + b.length], number) for number, b in entries]

    def _parse(self, data: memoryview, number: int) -> dict[str, NDArray[Any]]:
        entry, first = self._blocks[number], number * self.rows_per_block
        rows, where = min(self.rows_per_block, self.num_rows - first), f"{self.where}, rows from {first}"
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
    """Statistics of all rows by name; a column is read when first asked for and kept.

    With a folder of the node they are read by one of its processes, and mapped by all: `digest` is the sha256 of the
    index. Otherwise, and where they are small, each process reads its own.
    """

    def __init__(
        self, index: RowIndex | PartialIndex, names: Sequence[str], *, node: NodeFolder | None = None, digest: str = ""
    ) -> None:
        self._index, self._names, self._node, self._digest = index, tuple(names), node, digest
        self._columns: dict[str, NDArray[np.float32]] = {}
        self._expected: frozenset[str] = frozenset()

    def expect(self, names: Iterable[str]) -> None:
        """Say which columns, as far as there are such, are read in one pass over the index, with the first of them."""
        self._expected = frozenset(names) & frozenset(self._names)

    def _load(self, names: frozenset[str]) -> None:
        missing = sorted(names - self._columns.keys())
        node = shared_from(self._node, 4 * self._index.num_rows * len(missing))
        key = {"what": "row_stats", "version": _STATS_VERSION, "index": self._digest, "names": missing}
        self._columns.update(shared_arrays(node, key, partial(self._build, missing)).arrays)

    def _build(self, names: Sequence[str], add: Add) -> Mapping[str, Any]:
        columns = self._index.columns([f"stat.{name}" for name in names])
        for name in names:
            add(name, columns.pop(f"stat.{name}").astype(np.float32, copy=False))
        return {}

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._columns:
            self._load(self._expected | {name} if name in self._expected else frozenset([name]))
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
        self.num_rows = len(columns["unit"])

    def block(self, number: int) -> dict[str, NDArray[Any]]:
        span = slice(number * ROWS_PER_BLOCK, (number + 1) * ROWS_PER_BLOCK)
        return {name: values[span] for name, values in self._columns.items()}

    def column(self, name: str) -> NDArray[Any]:
        return self._columns[name]

    def columns(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        return {name: self._columns[name] for name in names}
