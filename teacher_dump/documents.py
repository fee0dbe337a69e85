"""Stream of documents out of input files: place, text, and how many bytes of the files have been read.

Memory holds one line, one batch of a Parquet file, or one plain text at a time.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import lzma
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

from potstill.common.errors import UserError
from potstill.teacher_dump.inputs import InputFile

log = logging.getLogger(__name__)

_PARQUET_BATCH = 64


@dataclass(frozen=True, order=True)
class Place:
    """Where a document stands: number of the file, number of the record in it (line, row; 0 for a plain text)."""

    file: int
    record: int


@dataclass(frozen=True)
class Document:
    """One text; `bad_lines` is the number of broken records before it, from the beginning of the input."""

    place: Place
    text: str
    bad_lines: int = 0


class BadRecord(Exception):
    """A record that cannot be used; counted by the reader, never raised to the user."""


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
        text_field: str,
        max_bad_lines: int,
        start: Place | None = None,
        bad_lines_before: int = 0,
    ) -> None:
        self._files = files
        self._text_field = text_field
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
                    for record, text in READERS[file.kind](file, raw, skip, self._text_field):
                        if isinstance(text, BadRecord):
                            self._bad.add(f"{file.path}, {_record_word(file)} {record + 1}", str(text))
                        else:
                            yield Document(Place(number, record), text, self.bad_lines)
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


Records = Iterator[tuple[int, "str | BadRecord"]]


def _read_jsonl(file: InputFile, raw: IO[bytes], skip: int, text_field: str) -> Records:
    for record, line in enumerate(_lines(file, raw)):
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
        if text_field not in value:
            raise UserError(
                f"{file.path}, line {record + 1}: no field {text_field!r}; found {sorted(value)}; set text_field"
            )
        yield record, as_text(value[text_field], text_field)


def _lines(file: InputFile, raw: IO[bytes]) -> Iterator[bytes]:
    try:
        yield from _decompressed(file, raw)
    except Exception as error:
        # zstandard has an error class of its own; the others are OSError, EOFError and LZMAError.
        if type(error).__name__ == "ZstdError" or isinstance(error, gzip.BadGzipFile):
            raise OSError(f"damaged {file.compression} data ({error})") from error
        raise


def _read_text(file: InputFile, raw: IO[bytes], skip: int, text_field: str) -> Records:
    if skip > 0:
        return
    content = b"".join(_lines(file, raw))
    try:
        # A byte order mark is no part of the text.
        yield 0, content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield 0, BadRecord(f"not UTF-8 at byte {error.start} (0x{content[error.start]:02x})")


def _read_parquet(file: InputFile, raw: IO[bytes], skip: int, text_field: str) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(raw)
    except pa.ArrowInvalid as error:
        raise UserError(f"input file {file.path} is not a readable Parquet file: {error}") from error
    if text_field not in table.schema_arrow.names:
        raise UserError(
            f"{file.path}: no column {text_field!r}; found {sorted(table.schema_arrow.names)}; set text_field"
        )
    record = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if record + rows <= skip:
            record += rows
            continue
        for batch in table.iter_batches(batch_size=_PARQUET_BATCH, row_groups=[group], columns=[text_field]):
            for value in batch.column(0):
                if record >= skip:
                    yield record, as_text(value.as_py(), text_field)
                record += 1


def as_text(value: Any, text_field: str) -> str | BadRecord:
    """The value itself if it can be tokenized, else why not."""
    if not isinstance(value, str):
        return BadRecord(f"field {text_field!r} is {type(value).__name__}, expected a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return BadRecord(f"field {text_field!r} holds half of a surrogate pair at character {error.start}")
    return value


READERS: dict[str, Callable[[InputFile, IO[bytes], int, str], Records]] = {
    "jsonl": _read_jsonl,
    "text": _read_text,
    "parquet": _read_parquet,
}
