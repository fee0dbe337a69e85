"""StoreReader: random access to the rows of a sealed store. Thread-safe; never writes."""

from __future__ import annotations

import copy
import logging
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from potstill.storage.errors import (
    CorruptError,
    GaveUpError,
    MismatchError,
    ReadFailedError,
    StoreError,
    UnsealedError,
)
from potstill.storage.files.commit import CommitRecord, committed_records
from potstill.storage.files.folder import StorePath
from potstill.storage.files.node_cache import NodeCache
from potstill.storage.files.node_folder import NodeFolder
from potstill.storage.files.paths import open_folder
from potstill.storage.files.unit_file import DecodedBatch
from potstill.storage.rows.array_types import Float32, Int32
from potstill.storage.rows.codec import planes_of
from potstill.storage.rows.columns import skippable_names
from potstill.storage.rows.row_types import Row, ScoresRow, TargetsRow, TokensRow
from potstill.storage.rows.vocabulary import DRAWS_NEED_ALL, VocabularyMap
from potstill.storage.store.index import PartialIndex, RowIndex, StatColumns
from potstill.storage.store.index_file import build_columns
from potstill.storage.store.neighbours import Key, key_of, runs_of_neighbours
from potstill.storage.store.seal import Manifest, load_manifest, open_index, store_digest
from potstill.storage.store.spec import RunSpec
from potstill.storage.store.stored_rows import as_stored
from potstill.storage.store.who_may_write import warn_of_writers
from potstill.storage.store.writer import load_id_map, load_spec

logger = logging.getLogger(__name__)

READ_ATTEMPTS = 3
RETRY_SECONDS = 0.05
DEFAULT_CACHE_BYTES = 64 << 30


def _check_skip(skip: Collection[str]) -> None:
    unknown = sorted(set(skip) - set(skippable_names()))
    if unknown:
        raise StoreError(f"skip: {unknown} are not among {skippable_names()}")


class StoreReader:
    """Rows of one store by number."""

    def __init__(
        self,
        path: StorePath,
        *,
        allow_partial: bool = False,
        num_units: int | None = None,
        skip: Collection[str] = (),
        cache_dir: StorePath | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        share_dir: StorePath | None = None,
    ) -> None:
        """Open a sealed store; UnsealedError otherwise.

        `allow_partial` opens an unsealed one as the longest run of committed units from 0, or exactly the first
        `num_units` of them, so that a resumed run sees the same rows although more units have arrived.
        `skip` names target columns that are not decoded: entropy, label, label_rank, tail_at, or a column of your own.
        `cache_dir` keeps what was read on a local disk, at most about `cache_bytes`; for remote stores.
        `share_dir` is a folder of the node, held to about as much, in which its processes share the statistics of rows
        and a copy of a remote store's index: one of them reads these, the others use what it has read.
        """
        _check_skip(skip)
        self._folder = open_folder(path)
        self._spec = load_spec(self._folder)
        self._skip = frozenset(skip)
        self._layout = planes_of(self._spec)
        self._id_map = load_id_map(self._folder, self._spec)
        self._manifest = load_manifest(self._folder, self._spec)
        self._cache = None if cache_dir is None else NodeCache(cache_dir, max_bytes=cache_bytes)
        self._node = None if share_dir is None else NodeFolder(share_dir, max_bytes=cache_bytes)
        self._vocabulary: VocabularyMap | None = None
        self._files: Sequence[str]
        self._index: RowIndex | PartialIndex
        self._is_partial = self._manifest is None or num_units is not None
        if self._manifest is not None and num_units is None:
            self._open_sealed(self._manifest)
        elif allow_partial:
            self._open_partial(num_units)
        else:
            raise UnsealedError(
                f"{self.url} is not sealed yet: `potstill status {self.url}` tells what is missing, "
                f"`potstill seal {self.url}` seals it when nothing is (in Python, allow_partial=True opens part of it)"
            )

        self._stats = StatColumns(self._index, self._spec.stats, node=self.shared_by, digest=self.index_digest or "")

    def _open_sealed(self, manifest: Manifest) -> None:
        self._files = [unit.file for unit in manifest.units]
        self._digest, self._num_rows, self._num_tokens = (
            manifest.store_digest,
            manifest.num_rows,
            manifest.num_tokens,
        )
        self._index = open_index(self._folder, manifest, self._spec)
        if self._node is not None:
            self._index.keep_copy(self._node, manifest.index_sha256)
        warn_of_writers(self._folder, self._files, index=manifest.index_file)

    def _open_partial(self, num_units: int | None) -> None:
        records = committed_records(self._folder, self._spec)
        present = 0
        while present in records and (num_units is None or present < num_units):
            present += 1
        if num_units is not None and present < num_units:
            raise UnsealedError(f"{self.url}: unit {present} of the {num_units} wanted units is not committed")
        chosen: list[CommitRecord] = [records[u] for u in range(present)]
        self._files = [record.file for record in chosen]
        self._digest = store_digest(self._spec.fingerprint, ["partial", *(r.sha256 for r in chosen)])
        self._num_rows = sum(len(r.num_tokens) for r in chosen)
        self._num_tokens = sum(int(r.num_tokens.sum()) for r in chosen)
        self._index = PartialIndex(build_columns(chosen, self._spec.stats))

    def skipping(self, skip: Collection[str]) -> StoreReader:
        """A reader of the same store that does not decode these target columns; this one stays as it is."""
        _check_skip(skip)
        reader = copy.copy(self)
        reader._skip = frozenset(skip)
        return reader

    def with_vocabulary(self, vocabulary: VocabularyMap | None) -> StoreReader:
        """A reader of the same store whose rows come in the student's ids, or as stored; this one stays as it is.

        `spec` and `digest` stay those of the stored rows. Raises MismatchError where the map is of another number of
        ids, or drops some that the store cannot do without.
        """
        if vocabulary is not None:
            self._check_vocabulary(vocabulary)
        reader = copy.copy(self)
        reader._vocabulary = vocabulary
        return reader

    def _check_vocabulary(self, vocabulary: VocabularyMap) -> None:
        if len(vocabulary.new_id) != self._spec.vocab_size:
            raise MismatchError(
                f"{self.url}: the store has {self._spec.vocab_size} ids, the vocabulary map is one of "
                f"{len(vocabulary.new_id)}; make it from the tokenizer that the store was made with"
            )
        if vocabulary.num_dropped and self._spec.num_draws is not None:
            raise MismatchError(f"{self.url}: {DRAWS_NEED_ALL}")
        if vocabulary.num_dropped and self._spec.max_entries >= vocabulary.vocab_size:
            raise MismatchError(
                f"{self.url}: a token may keep {self._spec.max_entries} entries, as many as the student has ids "
                f"({vocabulary.vocab_size}): the tail of what it lacks would be a bucket in which it has nothing"
            )

    @property
    def vocabulary(self) -> VocabularyMap | None:
        """What renames the ids of the rows; None: they come as they are stored."""
        return self._vocabulary

    @property
    def vocab_size(self) -> int:
        """The ids of the rows that this reader serves lie below it: of the store, or of its vocabulary map."""
        return self._spec.vocab_size if self._vocabulary is None else self._vocabulary.vocab_size

    @property
    def url(self) -> str:
        """Where the store lies."""
        return self._folder.url

    @property
    def spec(self) -> RunSpec:
        return self._spec

    @property
    def manifest(self) -> Manifest:
        """The seal; UnsealedError for a partial store."""
        if self._manifest is None:
            raise UnsealedError(f"{self.url} is not sealed and has no manifest")
        return self._manifest

    @property
    def digest(self) -> str:
        """sha256 (hex) that pins the content of the rows this reader serves."""
        return self._digest

    @property
    def num_units(self) -> int:
        """Units this reader serves (what `num_units` of a partial store is frozen to)."""
        return len(self._files)

    @property
    def num_rows(self) -> int:
        return self._num_rows

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    @property
    def row_stats(self) -> Mapping[str, Float32]:
        """Per-row statistics [num_rows] float32 by name, from the index alone; read-only arrays."""
        return self._stats

    def expect_stats(self, names: Iterable[str]) -> None:
        """Say which of `row_stats` will be asked for: they are read in one pass over the index, with the first."""
        self._stats.expect(names)

    @property
    def index_digest(self) -> str | None:
        """sha256 (hex) of the index, which pins the statistics of rows; None of a store that is not sealed."""
        return None if self._is_partial or self._manifest is None else self._manifest.index_sha256

    @property
    def shared_by(self) -> NodeFolder | None:
        """Where the processes of this node share what they work out of the store; None: each does it for itself."""
        return None if self.index_digest is None else self._node

    @property
    def row_lengths(self) -> Int32:
        """Tokens of each row, [num_rows] int32."""
        lengths: Int32 = self._index.column("num_tokens").astype(np.int32)
        return lengths

    def row(self, row: int) -> Row:
        """One row; CorruptError names file and row when its bytes are damaged."""
        return self.rows([row])[0]

    def rows(self, ids: Sequence[int] | NDArray[np.int64]) -> list[Row]:
        """Rows in the given order; rows that share a record batch cost one read."""
        wanted = [int(i) for i in ids]
        for row in wanted:
            if not 0 <= row < self._num_rows:
                raise StoreError(f"{self.url}: row {row} does not exist, the store has {self._num_rows} rows")
        entries = [self._locate(row) for row in wanted]
        together = self._read_together(entries)
        batches: dict[Key, DecodedBatch] = {}
        out: list[Row] = []
        for row, entry in zip(wanted, entries, strict=True):
            key = key_of(entry)
            if key not in batches:
                batches[key] = self._read_batch(row, entry, together.pop(key, None))
            out.append(self._decode(batches[key], row, entry))
        return out

    def tokens_rows(self, ids: Sequence[int] | NDArray[np.int64]) -> list[TokensRow]:
        """`rows` of a tokens store. Raises MismatchError for a store of another kind."""
        return cast("list[TokensRow]", self._rows_of("tokens", ids))

    def targets_rows(self, ids: Sequence[int] | NDArray[np.int64]) -> list[TargetsRow]:
        """`rows` of a targets store. Raises MismatchError for a store of another kind."""
        return cast("list[TargetsRow]", self._rows_of("targets", ids))

    def scores_rows(self, ids: Sequence[int] | NDArray[np.int64]) -> list[ScoresRow]:
        """`rows` of a scores store. Raises MismatchError for a store of another kind."""
        return cast("list[ScoresRow]", self._rows_of("scores", ids))

    def _rows_of(self, kind: str, ids: Sequence[int] | NDArray[np.int64]) -> list[Row]:
        if self._spec.kind != kind:
            raise MismatchError(f"{self.url} is a {self._spec.kind} store, expected a {kind} store")
        return self.rows(ids)

    def as_stored(self, rows: Sequence[Row], *, spec: RunSpec | None = None) -> list[Row]:
        """What a reader would find of these rows if they stood in this store; nothing is written.

        `spec`: of the store, with fewer columns.
        """
        return as_stored(rows, spec=self._spec if spec is None else spec, id_map=self._id_map)

    def read_bytes(self, ids: Sequence[int] | NDArray[np.int64]) -> int:
        """Bytes that `rows(ids)` reads: the record batches that hold these rows, each once. From the index alone."""
        entries = (self._locate(int(row)) for row in ids)
        return sum({(int(e["unit"]), int(e["offset"])): int(e["length"]) for e in entries}.values())

    def column_bytes(self, ids: Sequence[int] | NDArray[np.int64]) -> tuple[dict[str, int], int]:
        """Compressed bytes by column, and tokens, of the record batches that hold these rows."""
        seen: set[tuple[int, int]] = set()
        totals: dict[str, int] = {}
        num_tokens = 0
        for row in (int(i) for i in ids):
            entry = self._locate(row)
            key = (int(entry["unit"]), int(entry["offset"]))
            if key in seen:
                continue
            seen.add(key)
            batch = self._read_batch(row, entry)
            num_tokens += int(batch.num_tokens.sum())
            for name, num_bytes in batch.column_bytes().items():
                totals[name] = totals.get(name, 0) + num_bytes
        return totals, num_tokens

    def iter_unit_rows(self, first_row: int, count: int) -> Iterator[Row]:
        """Rows [first_row, first_row + count) in order, one record batch in memory at a time."""
        row, stop = first_row, min(first_row + count, self._num_rows)
        while row < stop:
            end, here = row + 1, self._locate(row)
            while end < stop and self._same_batch(here, self._locate(end)):
                end += 1
            yield from self.rows(range(row, end))
            row = end

    @staticmethod
    def _same_batch(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
        return bool(a["unit"] == b["unit"] and a["offset"] == b["offset"])

    def _locate(self, row: int) -> dict[str, Any]:
        number, line = divmod(row, self._index.rows_per_block)
        entry = {name: values[line] for name, values in self._index.block(number).items()}
        if int(entry["unit"]) != row // self._spec.rows_per_unit or int(entry["unit"]) >= len(self._files):
            raise CorruptError(f"{self.url}: the index puts row {row} into unit {int(entry['unit'])}")
        return entry

    def _read_together(self, entries: Sequence[Mapping[str, Any]]) -> dict[Key, memoryview]:
        """Unchecked bytes of batches that one request reads with others; of a local store, or of a cached one, none."""
        if self._folder.parallel_reads == 1 or self._cache is not None or len(entries) < 2:
            return {}
        found: dict[Key, memoryview] = {}
        for unit, spans in runs_of_neighbours(entries):
            first, length = spans[0][0], sum(spans[-1]) - spans[0][0]
            try:
                data = memoryview(self._folder.read_range(f"units/{self._files[unit]}", first, length))
            except GaveUpError:
                raise
            except (CorruptError, ReadFailedError) as error:
                logger.warning("%s; its record batches are read one by one", error)
                continue
            found |= {(unit, offset): data[offset - first : offset - first + size] for offset, size in spans}
        return found

    def _read_batch(self, row: int, entry: Mapping[str, Any], there: memoryview | None = None) -> DecodedBatch:
        """Read and check one message; transport errors exist, so a bad checksum is read again before it counts.

        `there`: its bytes where they came with those of its neighbours; if they do not fit they are read again alone.
        """
        file = f"units/{self._files[int(entry['unit'])]}"
        where = f"{self.url}/{file}, row {row}"
        data: bytes | memoryview | None = self._cached(entry)
        if data is None and there is not None and zlib.crc32(there) == int(entry["crc32"]):
            data = there
        if data is not None:
            return self._batch(data, where)
        for attempt in range(1, READ_ATTEMPTS + 1):
            try:
                data = self._folder.read_range(file, int(entry["offset"]), int(entry["length"]))
                if zlib.crc32(data) == int(entry["crc32"]):
                    if self._cache is not None:
                        self._cache.put(self._cache_key(entry), data)
                    return self._batch(data, where)
                problem: StoreError = CorruptError(
                    f"{where}: record batch at {int(entry['offset'])} does not fit its crc32; "
                    f"restore the file from a copy, or run `potstill repair {self.url}`, to make it again"
                )
            except GaveUpError:
                raise
            except ReadFailedError as error:
                problem = error
            logger.warning("attempt %d of %d: %s", attempt, READ_ATTEMPTS, problem)
            if attempt < READ_ATTEMPTS:
                time.sleep(RETRY_SECONDS * 2**attempt)
        raise problem

    def _batch(self, data: bytes | memoryview, where: str) -> DecodedBatch:
        return DecodedBatch(data, spec=self._spec, where=where, layout=self._layout)

    def _cache_key(self, entry: Mapping[str, Any]) -> str:
        return f"{self._digest[:24]}-{int(entry['unit'])}-{int(entry['offset'])}"

    def _cached(self, entry: Mapping[str, Any]) -> bytes | None:
        if self._cache is None:
            return None
        key = self._cache_key(entry)
        data = self._cache.get(key)
        if data is not None and zlib.crc32(data) != int(entry["crc32"]):
            logger.warning("%s: a cached record batch is damaged, reading it again", self.url)
            self._cache.drop(key)
            return None
        return data

    def _decode(self, batch: DecodedBatch, row: int, entry: Mapping[str, Any]) -> Row:
        position = int(entry["position"])
        stats = {name: float(entry[f"stat.{name}"]) for name in self._spec.stats}
        out = batch.decode(position, row=row, stats=stats, id_map=self._id_map, skip=self._skip)
        found = (int(batch.num_tokens[position]), int(batch.num_entries[position]))
        if found != (int(entry["num_tokens"]), int(entry["num_entries"])):
            raise CorruptError(f"{batch.where}: batch says {found} tokens and entries, the index says otherwise")
        return out if self._vocabulary is None else self._mapped(self._vocabulary, out)

    def _mapped(self, vocabulary: VocabularyMap, row: Row) -> Row:
        try:
            return vocabulary.map_row(row)
        except StoreError as error:
            raise type(error)(f"{self.url}: {error}") from error
