"""Stream of documents out of input files: place, record, and how many bytes of the files have been read.

Memory holds one line, one batch of a Parquet file, or one plain text at a time.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO

from potstill.common.errors import UserError
from potstill.teacher_dump.inputs import InputFile
from potstill.teacher_dump.records.base import BadRecord, Record, RecordKind, missing_field
from potstill.teacher_dump.records.table import PLAIN_TEXT

log = logging.getLogger(__name__)

_PARQUET_BATCH = 64


@dataclass(frozen=True, order=True)
class Place:
    """Where a document stands: number of the file, number of the record in it (line, row; 0 for a plain text)."""

    file: int
    record: int


@dataclass(frozen=True)
class Document:
    """One record; `bad_lines` is the number of broken records before it, from the beginning of the input."""

    place: Place
    record: Record
    bad_lines: int = 0


class BadRecords:
    """Counts broken records, those of an earlier run included; one more than `allowed` is a UserError."""

    def __init__(self, *, allowed: int, before: int = 0) -> None:
        self.count = before
        self._allowed = allowed

    def add(self, where: str, reason: str) -> None:
        """Count one; `where` names its place for a person. Raises UserError."""
        self.count += 1
        if self.count > self._allowed:
            raise UserError(
                f"{where}: {reason}. This is broken record {self.count}, {self._allowed} may be skipped; "
                "correct the input or raise max_bad_lines"
            )
        log.warning("%s: %s; skipped (%d of at most %d)", where, reason, self.count, self._allowed)


class DocumentReader:
    """Iterate over the documents of `files` from `start` on.

    `bad_lines` counts broken records since `start`; more than `max_bad_lines` of them (with `bad_lines_before`, those
    counted by an earlier run) is a UserError that names file and line. `bytes_read` is the progress over all files.
    """

    def __init__(
        self,
        files: Sequence[InputFile],
        *,
        kind: RecordKind,
        max_bad_lines: int,
        start: Place | None = None,
        bad_lines_before: int = 0,
    ) -> None:
        self._files = files
        self._kind = kind
        self._start = start if start is not None else Place(0, 0)
        self._bad = BadRecords(allowed=max_bad_lines, before=bad_lines_before)
        self._bytes_before = sum(file.num_bytes for file in files[: self._start.file])
        self._position: Callable[[], int] = lambda: 0

    @property
    def bad_lines(self) -> int:
        return self._bad.count

    @property
    def bytes_read(self) -> int:
        """Bytes of the files (as stored, before decompression) read so far, skipped files included."""
        return self._bytes_before + self._position()

    def __iter__(self) -> Iterator[Document]:
        for number in range(self._start.file, len(self._files)):
            file = self._files[number]
            skip = self._start.record if number == self._start.file else 0
            with ExitStack() as stack:
                try:
                    raw = stack.enter_context(file.path.open("rb"))
                    self._position = raw.tell
                    for record, found in READERS[file.kind](file, raw, skip, self._kind):
                        if isinstance(found, BadRecord):
                            self._bad.add(f"{file.path}, {_record_word(file)} {record + 1}", str(found))
                        else:
                            yield Document(Place(number, record), found, self.bad_lines)
                except (OSError, EOFError, lzma.LZMAError) as error:
                    raise UserError(f"input file {file.path} cannot be read to its end: {error}") from error
                finally:
                    self._position = lambda: 0
            self._bytes_before += file.num_bytes


def _record_word(file: InputFile) -> str:
    return {"jsonl": "line", "parquet": "row", "text": "text"}[file.kind]


def _decompressed(file: InputFile, raw: IO[bytes]) -> IO[bytes]:
    if file.compression == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if file.compression == ".xz":
        return lzma.LZMAFile(raw)
    if file.compression == ".zst":
        import zstandard

        # Files of several frames are common (one per writer flush); without this only the first would be read.
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return io.BufferedReader(reader, 1 << 20)
    return raw


Records = Iterator[tuple[int, "Record | BadRecord"]]


def _read_jsonl(file: InputFile, raw: IO[bytes], skip: int, kind: RecordKind) -> Records:
    for record, line in enumerate(lines_of(file, raw)):
        if record < skip or not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            yield record, BadRecord(f"not valid JSON ({error})")
            continue
        if not isinstance(value, dict):
            yield record, BadRecord(f"expected a JSON object, found {type(value).__name__}")
            continue
        missing = missing_field(kind, list(value))
        if missing is not None and kind.required:
            raise UserError(f"{file.path}, line {record + 1}: {missing}")
        yield record, kind.read(value) if missing is None else BadRecord(missing)


def lines_of(file: InputFile, raw: IO[bytes]) -> Iterator[bytes]:
    """The lines of an opened file, decompressed. Raises OSError, EOFError or LZMAError where it is damaged."""
    try:
        yield from _decompressed(file, raw)
    except Exception as error:
        # zstandard and zlib have error classes of their own; the others are OSError, EOFError and LZMAError.
        if type(error).__name__ == "ZstdError" or isinstance(error, gzip.BadGzipFile | zlib.error):
            raise OSError(f"damaged {file.compression} data ({error})") from error
        raise


def _read_text(file: InputFile, raw: IO[bytes], skip: int, kind: RecordKind) -> Records:
    if skip > 0:
        return
    if len(kind.fields) != 1 or PLAIN_TEXT not in kind.fields:
        raise UserError(
            f"{file.path} is read as one plain text, and {' and '.join(kind.fields)} name fields of a record; give "
            "JSON lines, Parquet or a data set, or leave them out"
        )
    content = b"".join(lines_of(file, raw))
    try:
        # A byte order mark is no part of the text.
        yield 0, kind.read({kind.fields[PLAIN_TEXT]: content.decode("utf-8-sig")})
    except UnicodeDecodeError as error:
        yield 0, BadRecord(f"not UTF-8 at byte {error.start} (0x{content[error.start]:02x})")


def _read_parquet(file: InputFile, raw: IO[bytes], skip: int, kind: RecordKind) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(raw)
    except pa.ArrowInvalid as error:
        raise UserError(f"input file {file.path} is not a readable Parquet file: {error}") from error
    if missing := missing_field(kind, table.schema_arrow.names):
        raise UserError(f"{file.path}: {missing.replace('field', 'column', 1)}")
    columns = list(kind.fields.values())
    record = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if record + rows <= skip:
            record += rows
            continue
        for batch in table.iter_batches(batch_size=_PARQUET_BATCH, row_groups=[group], columns=columns):
            for values in zip(*(batch.column(name) for name in columns), strict=True):
                if record >= skip:
                    found = (value.as_py() for value in values)
                    yield record, kind.read(dict(zip(columns, found, strict=True)))
                record += 1


READERS: dict[str, Callable[[InputFile, IO[bytes], int, RecordKind], Records]] = {
    "jsonl": _read_jsonl,
    "text": _read_text,
    "parquet": _read_parquet,
}
