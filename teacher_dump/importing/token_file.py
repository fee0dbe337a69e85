"""What every format of tokens gives: a file of records, each an array of ids, with a mask and bounds where it has them.

A record is what the file counts: a document of an index, a row of a table, a line. Nothing is read when a file is
opened but its header; `records` begins anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from potstill.common.errors import UserError
from potstill.teacher_dump.records.base import BadRecord

Ids = NDArray[Any]  # integers of the file's own type, often a view of a memory map


@dataclass(frozen=True)
class Reading:
    """What a format must be told to read a file; the fields are those of ImportTokensConfig, with defaults resolved.

    end_token: None where neither the options nor the tokenizer name one.
    """

    vocab_size: int
    end_token: int | None = None
    bounds: str = "auto"
    dtype: str | None = None
    ids_column: str | None = None
    mask_column: str | None = None
    attention_column: str | None = None

    @property
    def cuts_at_end_token(self) -> bool:
        """Whether documents end after end tokens where a file records no ends."""
        return self.bounds == "end_token" or (self.bounds == "auto" and self.end_token is not None)


@dataclass(frozen=True)
class TokenRecord:
    """One record: ids [n], mask bool [n] or None (all trained on), doc_lens int64 [d] (sum n) or None (one document).

    `ids` is a BadRecord where it cannot be used. `position`: bytes of the file up to the end of the record.
    """

    number: int
    ids: Ids | BadRecord
    position: int
    mask: NDArray[np.bool_] | None = None
    doc_lens: NDArray[np.int64] | None = None


class TokenFile(Protocol):
    """One opened file (with those beside it).

    paths:    the file itself, then those that belong to it; all are pinned by the digest of the input
    facts:    what run.json keeps of how it is read: dtype, bounds, columns
    has_mask: whether any record may have a mask
    word:     what a record is called: document, row, line
    hints:    what a person should know of the file: a column that is not used, an end that is not known
    """

    @property
    def paths(self) -> tuple[Path, ...]: ...

    @property
    def facts(self) -> Mapping[str, Any]: ...

    @property
    def has_mask(self) -> bool: ...

    @property
    def word(self) -> str: ...

    @property
    def hints(self) -> tuple[str, ...]: ...

    def records(self, skip: int) -> Iterator[TokenRecord]:
        """The records from number `skip` on. Raises UserError where the file is damaged."""


@dataclass(frozen=True)
class FlatArray:
    """`count` numbers of `dtype` from byte `offset` of a file on; mapped when it is opened, never read as a whole."""

    path: Path
    dtype: np.dtype[Any]
    count: int
    offset: int = 0

    def open(self) -> Ids:
        """The numbers [count], read-only."""
        if self.count == 0:
            return np.empty(0, self.dtype)  # an empty file cannot be mapped
        # A plain array on the map: slicing one costs a tenth of slicing a memmap object.
        return np.memmap(self.path, self.dtype, "r", self.offset, (self.count,)).view(np.ndarray)


def read_bytes(path: Path, count: int) -> bytes:
    """The first `count` bytes of a file, fewer where it is shorter."""
    with path.open("rb") as stream:
        return stream.read(count)


def file_size(path: Path) -> int:
    """Bytes of a file. Raises UserError where it is not there."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; it belongs to the input, restore it") from error


@dataclass(frozen=True)
class Segment:
    """Consecutive documents of a flat array: the first one's number and place, and the ends of all [d] int64."""

    first: int
    start: int
    ends: NDArray[np.int64]


class Bounds(Protocol):
    """Where the documents of a flat array end."""

    def segments(self, ids: Ids, skip: int) -> Iterator[Segment]:
        """All documents from number `skip` on, in pieces. Raises UserError where the recorded ends are damaged."""


@dataclass(frozen=True)
class FlatFile:
    """A TokenFile whose ids are one flat array: documents are views of the map, so that one may exceed memory."""

    paths: tuple[Path, ...]
    ids: FlatArray
    bounds: Bounds
    facts: Mapping[str, Any]
    mask: FlatArray | None = None
    hints: tuple[str, ...] = field(default=())
    word: str = "document"

    @property
    def has_mask(self) -> bool:
        return self.mask is not None

    def records(self, skip: int) -> Iterator[TokenRecord]:
        """The documents from number `skip` on."""
        ids = self.ids.open()
        flags = None if self.mask is None else self.mask.open()
        size = ids.dtype.itemsize
        for segment in self.bounds.segments(ids, skip):
            start = segment.start
            for number, end in enumerate(segment.ends.tolist(), segment.first):
                position = self.ids.offset + end * size
                mask = None if flags is None else _as_mask(flags[start:end])
                if isinstance(mask, BadRecord):
                    yield TokenRecord(number, mask, position)
                else:
                    yield TokenRecord(number, ids[start:end], position, mask)
                start = end


def _as_mask(flags: Ids) -> NDArray[np.bool_] | BadRecord:
    """bool [n] of bytes that are 0 or 1, or why there is none."""
    if len(flags) and int(flags.max()) > 1:
        place = int(np.argmax(flags > 1))
        return BadRecord(f"the loss mask of token {place} is {int(flags[place])}, expected 0 or 1")
    return flags.view(np.bool_)  # no copy: a document may be larger than memory
