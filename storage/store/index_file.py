"""Writing index.arrow: rows come unit by unit, and each block of rows leaves memory as soon as it is full."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
from numpy.typing import NDArray

from potstill.storage.files.commit import CommitRecord
from potstill.storage.store.index import ROWS_PER_BLOCK, IndexBlock, column_types
from potstill.storage.store.record_block import RecordBlock

_READ_BYTES = 256 << 10

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class EncodedIndex:
    """An index in a local file: its bytes, sha256 (hex) and where its blocks of rows lie."""

    num_bytes: int
    sha256: str
    blocks: tuple[IndexBlock, ...]


def build_columns(records: Iterable[CommitRecord], stats: Sequence[str]) -> Columns:
    """Whole index columns from the records in unit order."""
    return block_columns(RecordBlock.of(list(records), stats), stats)


def block_columns(block: RecordBlock, stats: Sequence[str]) -> Columns:
    """Index columns of the rows of some units."""
    offset, length, crc32, rows_of = block.batch_table.T
    starts = np.cumsum(rows_of) - rows_of
    values = {
        "unit": np.repeat(block.units, block.num_rows),
        "offset": np.repeat(offset, rows_of),
        "length": np.repeat(length, rows_of),
        "crc32": np.repeat(crc32, rows_of),
        "position": np.arange(len(block.num_tokens)) - np.repeat(starts, rows_of),
        "num_tokens": block.num_tokens,
        "num_entries": block.num_entries,
        **{f"stat.{name}": block.stats[name] for name in stats},
    }
    return {name: values[name].astype(dtype) for name, dtype in column_types(stats)}


class IndexWriter:
    """Writes index.arrow (uncompressed, so that one block can be read alone) to a local file, some rows at a time."""

    def __init__(self, path: Path, stats: Sequence[str], fingerprint: str) -> None:
        self._path = path
        self._types = column_types(stats)
        fields = [pa.field(name, pa.from_numpy_dtype(np.dtype(dtype)), False) for name, dtype in self._types]
        self._schema = pa.schema(fields, metadata={"potstill.fingerprint": fingerprint})
        # The header is written with the first batch: a magic number, filled up to 8 bytes, and the schema.
        self._header_bytes = 8 + self._schema.serialize().size
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = ipc.new_file(self._sink, self._schema)
        self._waiting: list[Columns] = []
        self._num_waiting = 0
        self._spans: list[tuple[int, int]] = []

    def add(self, columns: Columns) -> None:
        """The next rows."""
        self._waiting.append(columns)
        self._num_waiting += len(columns["unit"])
        if self._num_waiting >= ROWS_PER_BLOCK:
            self._write(self._num_waiting // ROWS_PER_BLOCK * ROWS_PER_BLOCK)

    def finish(self) -> EncodedIndex:
        """Write what is left and close the file."""
        if self._num_waiting:
            self._write(self._num_waiting)
        self.close()
        return self._checksums()

    def close(self) -> None:
        """Let go of the file, whole or not."""
        if not self._sink.closed:
            self._writer.close()
            self._sink.close()

    def _write(self, num_rows: int) -> None:
        """Write the first `num_rows` rows in blocks, and keep the others."""
        whole = {name: np.concatenate([part[name] for part in self._waiting]) for name, _ in self._types}
        arrays = [pa.array(whole[name][:num_rows]) for name, _ in self._types]
        batch = pa.RecordBatch.from_arrays(arrays, schema=self._schema)
        for first in range(0, num_rows, ROWS_PER_BLOCK):
            before = max(self._sink.tell(), self._header_bytes)
            self._writer.write_batch(batch.slice(first, ROWS_PER_BLOCK))
            self._spans.append((before, self._sink.tell() - before))
        self._waiting = [{name: values[num_rows:].copy() for name, values in whole.items()}]
        self._num_waiting -= num_rows

    def _checksums(self) -> EncodedIndex:
        digest, blocks, done = hashlib.sha256(), [], 0
        with self._path.open("rb") as file:
            for offset, length in self._spans:
                digest.update(file.read(offset - done))
                data = file.read(length)
                digest.update(data)
                blocks.append(IndexBlock(offset, length, zlib.crc32(data)))
                done = offset + length
            while data := file.read(_READ_BYTES):
                digest.update(data)
                done += len(data)
        return EncodedIndex(done, digest.hexdigest(), tuple(blocks))
