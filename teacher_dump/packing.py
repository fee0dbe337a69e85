"""Rows out of documents: a store's rows are its documents, end to end, cut every L tokens.

A cut document becomes two spans; attention and targets stay inside a span. Because of this plain rule the whole state
at the end of a row is (next document, tokens of it already used), which is what a resumed run needs to know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from potstill.storage import TokensRow
from potstill.teacher_dump.documents import Document, Place


@dataclass(frozen=True)
class Cursor:
    """State at a unit's end: go on at `place`, leaving out the first `offset` tokens of the document there."""

    place: Place
    offset: int
    documents: int  # documents begun so far in this store
    tokens: int
    bad_lines: int  # broken records before `place`

    def to_json(self) -> dict[str, int]:
        return {
            "file": self.place.file,
            "record": self.place.record,
            "offset": self.offset,
            "documents": self.documents,
            "tokens": self.tokens,
            "bad_lines": self.bad_lines,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Cursor:
        place = Place(int(value["file"]), int(value["record"]))
        names = ("offset", "documents", "tokens", "bad_lines")
        return cls(place, **{name: int(value[name]) for name in names})


@dataclass(frozen=True)
class PackedRow:
    """A finished row and the cursor right after it."""

    row: TokensRow
    cursor: Cursor


class Packer:
    """Cut a stream of documents into rows of `row_length` tokens; `start` is the cursor of an earlier run."""

    def __init__(self, *, row_length: int, first_row: int = 0, start: Cursor | None = None) -> None:
        self._row_length = row_length
        self._next_row = first_row
        self._start = start
        self._spans: list[np.ndarray] = []
        self._filled = 0
        self._documents = start.documents if start else 0
        self._tokens = start.tokens if start else 0

    @property
    def documents(self) -> int:
        return self._documents

    @property
    def tokens(self) -> int:
        return self._tokens

    def wants(self, place: Place) -> bool:
        """False for documents that earlier rows hold already."""
        return self._start is None or place >= self._start.place

    def add(self, document: Document, ids: np.ndarray) -> Iterator[PackedRow]:
        """Append a document's ids [n] int32; yields the rows it completes. Empty documents leave no trace."""
        place = document.place
        used = 0
        if self._start is not None and place == self._start.place:
            used = self._start.offset
        if used == 0 and len(ids):
            self._documents += 1
        while used < len(ids):
            take = min(self._row_length - self._filled, len(ids) - used)
            self._spans.append(ids[used : used + take])
            self._filled += take
            self._tokens += take
            used += take
            if self._filled == self._row_length:
                here, offset = (place, used) if used < len(ids) else (Place(place.file, place.record + 1), 0)
                cursor = Cursor(here, offset, self._documents, self._tokens, document.bad_lines)
                yield PackedRow(self._take_row(), cursor)

    def finish(self, end: Place, *, bad_lines: int) -> Iterator[PackedRow]:
        """Yield the last row, if it holds fewer than L tokens."""
        if self._filled:
            yield PackedRow(self._take_row(), Cursor(end, 0, self._documents, self._tokens, bad_lines))

    def _take_row(self) -> TokensRow:
        row = TokensRow(
            row=self._next_row,
            tokens=np.concatenate(self._spans).astype(np.int32, copy=False),
            doc_lens=np.array([len(span) for span in self._spans], dtype=np.int32),
        )
        self._next_row += 1
        self._spans, self._filled = [], 0
        return row
