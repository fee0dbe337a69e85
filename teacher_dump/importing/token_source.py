"""The documents of all files of an import, in order, each with a place that means the same in every run."""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.teacher_dump.documents import BadRecords, Place
from potstill.teacher_dump.importing.token_file import Ids, Reading, TokenFile, TokenRecord, file_size
from potstill.teacher_dump.importing.token_formats import TOKEN_FORMATS
from potstill.teacher_dump.importing.token_search import FoundFile
from potstill.teacher_dump.inputs import InputFile, digest_files
from potstill.teacher_dump.records.base import BadRecord

log = logging.getLogger(__name__)

# A record may hold several documents: `Place.record` is PARTS times the record's number, and the document's inside it.
PARTS = 1 << 20
_CHUNK = 1 << 20  # tokens looked at together


@dataclass(frozen=True)
class TokenDocument:
    """One document: ids [n] of the file's own integer type, checked; mask bool [n] or None; bad records before it.

    `together`: ids of what must fall on one side of the held-out split: the document, or the row that it belongs to.
    """

    place: Place
    ids: Ids
    mask: NDArray[np.bool_] | None
    bad_lines: int
    together: Ids

    def key(self) -> str:
        """Equal ids have equal keys, whatever the type of the file: blake2b (16 bytes) of them as int32."""
        digest = hashlib.blake2b(digest_size=16)
        for first in range(0, len(self.together), _CHUNK):
            digest.update(self.together[first : first + _CHUNK].astype("<i4").tobytes())
        return digest.hexdigest()


class TokenSource:
    """All files of an import, opened. `notes` is what a person should know; it grows while they are read.

    `longest`: tokens that a record may have, where each is a row; None: any number.
    """

    def __init__(
        self, found: Sequence[FoundFile], reading: Reading, *, longest: int | None, max_bad_lines: int
    ) -> None:
        self.reading, self.longest, self.max_bad_lines = reading, longest, max_bad_lines
        self.files: list[TokenFile] = []
        self.sizes: list[int] = []
        inputs: list[InputFile] = []
        for one in found:
            file: TokenFile = importlib.import_module(TOKEN_FORMATS[one.format].module).open_file(one.path, reading)
            parts = [_input(path, one) for path in file.paths]
            self.files.append(file)
            self.sizes.append(sum(part.num_bytes for part in parts))
            inputs += parts
        self.num_files, self.num_bytes = len(self.files), sum(self.sizes)
        self.has_mask = any(file.has_mask for file in self.files)
        self.notes: list[str] = list(dict.fromkeys(hint for file in self.files for hint in file.hints))
        ways: list[dict[str, Any]] = []
        for file in self.files:
            ways += [] if dict(file.facts) in ways else [dict(file.facts)]
        self.info: Mapping[str, Any] = {
            "format": found[0].format,
            "digest": digest_files(inputs),
            "files": self.num_files,
            "bytes": self.num_bytes,
            "read_as": ways,  # each way once
        }

    def read(self, *, start: Place | None = None, bad_lines: int = 0) -> TokenReader:
        """The documents from `start` on; `bad_lines` broken records were counted before it."""
        return TokenReader(self, start if start is not None else Place(0, 0), bad_lines=bad_lines)

    def note(self, text: str) -> None:
        """Log a warning, and keep it for the summary."""
        log.warning("%s", text)
        self.notes.append(text)


class TokenReader:
    """One pass over the documents from `start` on. Raises UserError where a file is damaged."""

    def __init__(self, source: TokenSource, start: Place, *, bad_lines: int) -> None:
        self._source, self._start = source, start
        self._bad = BadRecords(allowed=source.max_bad_lines, before=bad_lines)
        self.bytes_read = sum(source.sizes[: start.file])

    @property
    def bad_lines(self) -> int:
        """Broken records so far, those before the start included."""
        return self._bad.count

    def __iter__(self) -> Iterator[TokenDocument]:
        source = self._source
        for number in range(self._start.file, source.num_files):
            file, before = source.files[number], sum(source.sizes[:number])
            skip = self._start.record // PARTS if number == self._start.file else 0
            to_end = skip == 0 and file.facts["bounds"] == "end_token" and source.sizes[number] > 0
            for record in file.records(skip):
                problem = record.ids if isinstance(record.ids, BadRecord) else self._problem(record.ids, record)
                if problem is not None:
                    self._bad.add(f"{file.paths[0]}, {file.word} {record.number + 1}", str(problem))
                    continue
                for document in self._documents(number, record):
                    to_end = to_end and not (len(document.ids) and document.ids[-1] == source.reading.end_token)
                    yield document
                self.bytes_read = before + min(record.position, source.sizes[number])
            self.bytes_read = before + source.sizes[number]
            if to_end:
                source.note(
                    f"{file.paths[0]}: its end token {source.reading.end_token} never occurs, so that nothing says "
                    "where documents end (--end-token, --bounds)"
                )

    def _problem(self, ids: Ids, record: TokenRecord) -> BadRecord | None:
        """Why a record cannot be used."""
        size, longest = self._source.reading.vocab_size, self._source.longest
        for first in range(0, len(ids), _CHUNK):
            chunk = ids[first : first + _CHUNK]
            if int(chunk.max()) >= size or (chunk.dtype.kind == "i" and int(chunk.min()) < 0):
                place = int(np.argmax((chunk >= size) | (chunk < 0)))
                return BadRecord(
                    f"token {first + place} is {int(chunk[place])}, expected an id below {size}, the size of the "
                    "tokenizer's vocabulary: another tokenizer made it, or its type is another (--dtype)"
                )
        if longest is not None and len(ids) > longest:
            return BadRecord(f"a row of {len(ids)} tokens, where row_length is {longest}; raise it, or pack otherwise")
        if record.doc_lens is not None and len(record.doc_lens) > PARTS:
            return BadRecord(f"{len(record.doc_lens)} documents in one record, {PARTS} at most")
        return None

    def _documents(self, number: int, record: TokenRecord) -> Iterator[TokenDocument]:
        """The documents of a record that is sound."""
        assert not isinstance(record.ids, BadRecord)
        ids, mask, first = record.ids, record.mask, record.number * PARTS
        if record.doc_lens is None:
            yield TokenDocument(Place(number, first), ids, mask, self.bad_lines, ids)
            return
        start = 0
        for part, length in enumerate(record.doc_lens.tolist()):
            here = slice(start, start + length)
            own = ids[here]
            together = own if self._source.longest is None else ids
            place = Place(number, first + part)
            yield TokenDocument(place, own, None if mask is None else mask[here], self.bad_lines, together)
            start += length


def _input(path: Path, one: FoundFile) -> InputFile:
    above = one.name.rpartition("/")[0]
    return InputFile(path, f"{above}/{path.name}" if above else path.name, one.format, "", file_size(path))
