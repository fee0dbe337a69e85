"""Where the documents of a flat array of ids end: recorded in a file beside it, after each end token, or nowhere."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from potstill.common.errors import UserError
from potstill.teacher_dump.importing.token_file import Bounds, FlatArray, Ids, Reading, Segment

_BLOCK_DOCUMENTS = 1 << 13
_BLOCK_TOKENS = 1 << 20
INSTEAD = "or cut after end tokens instead (--bounds end_token)"


@dataclass(frozen=True)
class WholeFile:
    """One document: all of it."""

    def segments(self, ids: Ids, skip: int) -> Iterator[Segment]:
        if skip == 0:
            yield Segment(0, 0, np.array([len(ids)], np.int64))


@dataclass(frozen=True)
class AfterEndTokens:
    """A document ends after each end token; what follows the last one is a document too.

    The file is searched from its beginning, a million tokens at a time.
    """

    end_token: int

    def segments(self, ids: Ids, skip: int) -> Iterator[Segment]:
        number = start = 0
        for block in range(0, len(ids), _BLOCK_TOKENS):
            ends = np.flatnonzero(ids[block : block + _BLOCK_TOKENS] == self.end_token) + (block + 1)
            before = min(max(skip - number, 0), len(ends))
            if before:
                number, start, ends = number + before, int(ends[before - 1]), ends[before:]
            if len(ends):
                yield Segment(number, start, ends)
                number, start = number + len(ends), int(ends[-1])
        if start < len(ids) and number >= skip:
            yield Segment(number, start, np.array([len(ids)], np.int64))


@dataclass(frozen=True)
class RecordedEnds:
    """datatrove's `.ds.index`: the end of each document in tokens, uint64, the last one the number of tokens."""

    ends: FlatArray

    def segments(self, ids: Ids, skip: int) -> Iterator[Segment]:
        ends = self.ends.open()
        start = int(ends[skip - 1]) if 0 < skip <= len(ends) else 0
        for first in range(skip, len(ends), _BLOCK_DOCUMENTS):
            block = ends[first : first + _BLOCK_DOCUMENTS]
            check_growing(block, start=start, last=len(ids), first=first, path=self.ends.path, what="end")
            yield Segment(first, start, block.astype(np.int64))
            start = int(block[-1])


def check_growing(block: Ids, *, start: int, last: int, first: int, path: Path, what: str) -> None:
    """Refuse ends [d] that fall, below `start`, or above `last`. Raises UserError that names the entry."""
    # In the file's own type: a difference of unsigned numbers would wrap round.
    falls = np.flatnonzero(block[1:] < block[:-1]) + 1
    if len(block) and int(block[0]) < start:
        falls = np.concatenate([[0], falls])
    above = np.flatnonzero(block > last)
    wrong = min([*falls[:1].tolist(), *above[:1].tolist()], default=None)
    if wrong is not None:
        before = start if wrong == 0 else int(block[wrong - 1])
        raise UserError(
            f"{path}: {what} {first + wrong} is {int(block[wrong])}, expected {before} to {last}; the file is damaged "
            f"or belongs to other tokens: restore it, {INSTEAD}"
        )


@dataclass(frozen=True)
class CsvBounds:
    """The `.csv.gz` of OLMo-core and dolma: a line `start,end[,...]` in tokens for each document, end exclusive."""

    path: Path

    def segments(self, ids: Ids, skip: int) -> Iterator[Segment]:
        number = position = start = 0
        ends: list[int] = []
        try:
            with gzip.open(self.path, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines):
                    if number == skip:
                        start = position
                    position = self._end(line, number, position, len(ids))
                    if number >= skip:
                        ends.append(position)
                    if len(ends) == _BLOCK_DOCUMENTS:
                        yield Segment(number + 1 - len(ends), start, np.array(ends, np.int64))
                        start, ends = position, []
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise UserError(f"{self.path} cannot be read to its end: {error}; restore it, {INSTEAD}") from error
        if position != len(ids):
            raise UserError(
                f"{self.path}: the last document ends at token {position}, but there are {len(ids)} tokens; the file "
                f"belongs to other tokens: restore it, {INSTEAD}"
            )
        if ends:
            yield Segment(number + 1 - len(ends), start, np.array(ends, np.int64))

    def _end(self, line: str, number: int, before: int, last: int) -> int:
        """The end in a line whose start must be where the document before it ended."""
        fields = line.rstrip("\r\n").split(",")
        if len(fields) < 2 or not all(field.isascii() and field.isdigit() for field in fields[:2]):
            raise UserError(
                f"{self.path}, line {number + 1}: expected start,end in tokens, found {line[:80]!r}; restore it, "
                f"{INSTEAD}"
            )
        start, end = int(fields[0]), int(fields[1])
        if start != before or not start <= end <= last:
            raise UserError(
                f"{self.path}, line {number + 1}: a document of tokens {start} to {end}, expected one that begins at "
                f"{before} and ends at {last} at most; the file is damaged or belongs to other tokens: restore it, "
                f"{INSTEAD}"
            )
        return end


def choose_bounds(path: Path, recorded: Bounds | None, reading: Reading) -> tuple[Bounds, str, tuple[str, ...]]:
    """(bounds, their name for run.json, what to tell) of a flat file. UserError where those named are not there."""
    if recorded is not None:
        return recorded, "recorded", ()
    if reading.bounds == "recorded":
        raise UserError(
            f"{path}: nothing beside it says where documents end, and bounds is recorded; restore the file that does, "
            "or use --bounds end_token"
        )
    if reading.cuts_at_end_token:
        assert reading.end_token is not None
        return AfterEndTokens(reading.end_token), "end_token", ()
    hint = "nothing says where documents end: each file is read as one document"
    return WholeFile(), "none", (hint,) if reading.bounds == "auto" else ()
