"""verify_store: check a store as far as asked, from sizes and checksums down to every decoded row."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc

from potstill.storage.errors import CorruptError, HungReadError, StoreError
from potstill.storage.files.commit import CommitRecord, committed_records
from potstill.storage.files.folder import StoreFolder, StorePath
from potstill.storage.files.ipc_layout import parse_footer
from potstill.storage.files.paths import open_folder
from potstill.storage.files.unit_file import arrow_schema
from potstill.storage.rows.only_rows import ONLY_ROWS, check_held_row, held_mask, only_rows_field
from potstill.storage.rows.row_checks import check_tokens_columns
from potstill.storage.rows.row_types import Row, TargetsRow, TokensRow
from potstill.storage.rows.target_checks import check_kept_normaliser
from potstill.storage.rows.validation import validate
from potstill.storage.store.held_rows import held_rows
from potstill.storage.store.index import build_columns
from potstill.storage.store.reader import StoreReader
from potstill.storage.store.seal import MANIFEST_NAME, Manifest, load_manifest, open_index
from potstill.storage.store.spec import RunSpec
from potstill.storage.store.writer import load_id_map, load_spec

Progress = Callable[[int], None]


@dataclass(frozen=True)
class VerifyReport:
    """What was checked and what is wrong; `problems` is empty for a sound store."""

    sealed: bool
    deep: bool
    num_units: int
    num_rows: int
    num_bytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def format(self) -> str:
        """Text for a terminal."""
        depth = "every row decoded" if self.deep else "sizes, records and index only"
        head = f"{self.num_units} units, {self.num_rows} rows, {self.num_bytes} bytes checked ({depth}): "
        head += "sound" if self.ok else f"{len(self.problems)} problems"
        state = "sealed" if self.sealed else "not sealed"
        return "\n".join([f"{head}; {state}", *(f"  {problem}" for problem in self.problems)])


def verify_store(path: StorePath, *, deep: bool, progress: Progress | None = None) -> VerifyReport:
    """Check sizes, records, index and manifest; `deep` adds the sha256 of every file and decodes every row.

    Raises StoreError only when run.json or the manifest cannot be read at all; damage is reported as problems.
    `progress` is called with the number of rows just checked.
    """
    folder = open_folder(path)
    spec = load_spec(folder)
    problems: list[str] = []
    try:
        load_id_map(folder, spec)
        manifest = load_manifest(folder, spec)
    except StoreError as error:
        return VerifyReport(True, deep, 0, 0, 0, (str(error),))
    records = committed_records(folder, spec)
    if manifest is not None:
        problems += _check_manifest(folder, spec, manifest, records, deep=deep)
    num_rows = num_bytes = 0
    for record in records.values():
        problems += _check_unit(folder, spec, record, deep=deep)
        num_rows, num_bytes = num_rows + len(record.num_tokens), num_bytes + record.num_bytes
        if progress is not None and not deep:
            progress(len(record.num_tokens))
    if deep:
        problems += _check_rows(path, manifest, progress)
    return VerifyReport(manifest is not None, deep, len(records), num_rows, num_bytes, tuple(problems))


def _check_manifest(
    folder: StoreFolder, spec: RunSpec, manifest: Manifest, records: dict[int, CommitRecord], *, deep: bool
) -> list[str]:
    problems = []
    for unit, entry in enumerate(manifest.units):
        record = records.get(unit)
        if record is None:
            problems.append(f"{folder.url}: unit {unit} is sealed but has no readable record")
        elif (record.file, record.num_bytes, record.sha256) != (entry.file, entry.num_bytes, entry.sha256):
            problems.append(f"{folder.url}/{MANIFEST_NAME}: unit {unit} names {entry.file}, its record {record.file}")
    where = f"{folder.url}/{manifest.index_file}"
    if folder.size(manifest.index_file) != manifest.index_bytes:
        return [*problems, f"{where}: {folder.size(manifest.index_file)} bytes, expected {manifest.index_bytes}"]
    data = folder.read(manifest.index_file, max_bytes=manifest.index_bytes) or b""
    if hashlib.sha256(data).hexdigest() != manifest.index_sha256:
        return [*problems, f"{where}: content does not fit the sha256 of the manifest"]
    if deep and not problems:
        index = open_index(folder, manifest, spec)
        wanted = build_columns((records[u] for u in range(len(manifest.units))), spec.stats)
        for name, values in wanted.items():
            try:
                if not np.array_equal(index.column(name), values):
                    problems.append(f"{where}: column {name} does not fit the records")
            except CorruptError as error:
                return [*problems, str(error)]
    return problems


def _check_unit(folder: StoreFolder, spec: RunSpec, record: CommitRecord, *, deep: bool) -> list[str]:
    name = f"units/{record.file}"
    where = f"{folder.url}/{name}"
    found = folder.size(name)
    if found != record.num_bytes:
        return [f"{where}: {found} bytes, its record says {record.num_bytes}"]
    if not deep:
        return []
    data = folder.read(name, max_bytes=record.num_bytes) or b""
    if hashlib.sha256(data).hexdigest() != record.sha256:
        return [f"{where}: content of unit {record.unit} does not fit its sha256"]
    try:
        blocks = parse_footer(data, where=where)
    except CorruptError as error:
        return [str(error)]
    listed = [(b.offset, b.length, b.crc32) for b in record.batches]
    if listed != [(o, n, zlib.crc32(data[o : o + n])) for o, n in blocks]:
        return [f"{where}: batches in the footer are not those of the record"]
    try:
        schema = ipc.open_file(pa.py_buffer(data)).schema
    except pa.ArrowException as error:
        return [f"{where}: not an Arrow file ({error})"]
    if not schema.equals(arrow_schema(spec, record.unit), check_metadata=True):
        return [f"{where}: schema or fingerprint belongs to another run"]
    return []


def _check_rows(path: StorePath, manifest: Manifest | None, progress: Progress | None) -> list[str]:
    """Decode every row and re-check the rules of its content."""
    problems: list[str] = []
    reader = StoreReader(path, allow_partial=manifest is None)
    held = held_rows(reader)
    if held is not None and manifest is not None:
        found = only_rows_field(held_mask(held, reader.num_rows)) if len(held) else None
        if found != reader.spec.only_rows:
            problems.append(f"{reader.url}: rows held make {found}, {ONLY_ROWS} of run.json is {reader.spec.only_rows}")
    for row in range(reader.num_rows):
        try:
            _check_content(reader.row(row), reader.spec, where=f"{reader.url}: row {row}")
        except HungReadError:  # every other row would be waited for as long
            raise
        except StoreError as error:
            problems.append(str(error))
        if progress is not None:
            progress(1)
    return problems


def _check_content(row: Row, spec: RunSpec, *, where: str) -> None:
    """The rules that a decoded row keeps besides those of the decoder. Raises StoreError."""
    try:
        if isinstance(row, TokensRow):
            check_tokens_columns(row, spec)
        if isinstance(row, TargetsRow):
            validate(row.targets, vocab_size=spec.vocab_size, strict=False)
            if spec.normaliser == "kept":
                check_kept_normaliser(row.targets, strict=False)
            if spec.only_rows is not None:
                check_held_row(row.stats, row.targets.num_entries)
    except StoreError as error:
        raise CorruptError(f"{where}: {error}") from None
