"""Rule `rows`: each record of the input is a row of its own, with the bounds of the documents inside it.

For sets whose records are rows already. A record of more than L tokens is split into several. A row may be shorter than
L: what it lacks is stored nowhere. With masks a row that trains on nothing is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.packing.base import (
    JUDGED,
    LOST_TOKENS,
    TOO_LONG,
    TRAINED,
    UNTRAINED,
    Cursor,
    Ids,
    Mask,
    PackedRow,
    PackerStart,
    joined_row,
)


def make(made: PackerStart) -> RecordPacker:
    """The packer of this rule."""
    return RecordPacker(made)


class RecordPacker:
    """See Packer."""

    what_is_judged = "rows"

    def __init__(self, made: PackerStart) -> None:
        self._row_length, self._masked, self._parts = made.row_length, made.masked, made.parts
        self._next_row = made.first_row
        self._start = made.start
        self._spans: list[tuple[Ids, Mask | None]] = []
        self._filled = 0
        self._last = Place(0, -1)  # of the document that was added last
        self._bad_lines = 0
        more = made.start.more if made.start else {}
        self._documents = made.start.documents if made.start else 0
        self._tokens = made.start.tokens if made.start else 0
        names = (TOO_LONG, LOST_TOKENS, *((TRAINED, JUDGED, UNTRAINED) if made.masked else ()))
        self._counts = {name: more.get(name, 0) for name in names}

    @property
    def documents(self) -> int:
        return self._documents

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def counts(self) -> Mapping[str, int]:
        return self._counts

    def wants(self, place: Place) -> bool:
        return self._start is None or place >= self._start.place

    def add(self, place: Place, ids: Ids, mask: Mask | None = None, *, bad_lines: int = 0) -> Iterator[PackedRow]:
        assert mask is None or self._masked, "the packer was made for documents without masks"
        if (place.file, place.record // self._parts) != (self._last.file, self._last.record // self._parts):
            yield from self._take_row(Place(self._last.file, self._last.record + 1), 0)
        self._last, self._bad_lines = place, bad_lines
        used = self._start.offset if self._start is not None and place == self._start.place else 0
        while used < len(ids):
            if self._filled == self._row_length:
                yield from self._take_row(place, used)
            if used == 0:  # after the row before it, whose cursor does not count it
                self._documents += 1
                self._counts[TOO_LONG] += len(ids) > self._row_length
            take = min(self._row_length - self._filled, len(ids) - used)
            here = slice(used, used + take)
            self._spans.append((ids[here], None if mask is None else mask[here]))
            self._filled += take
            used += take

    def finish(self, end: Place, *, bad_lines: int) -> Iterator[PackedRow]:
        self._bad_lines = bad_lines
        yield from self._take_row(end, 0)

    def last_cursor(self, end: Place, *, bad_lines: int) -> Cursor | None:
        return Cursor(end, 0, self._documents, self._tokens, bad_lines, dict(self._counts))

    def _take_row(self, place: Place, offset: int) -> Iterator[PackedRow]:
        """The row that is there, if any; a later run continues at token `offset` of the document at `place`."""
        if not self._spans:
            return
        row = joined_row(self._next_row, self._spans)
        self._spans, self._filled = [], 0
        if self._masked:
            trained = int(row.has_target().sum())
            self._counts[JUDGED] += 1
            self._counts[TRAINED] += trained
            if not trained:
                self._counts[UNTRAINED] += 1
                return
        self._tokens += len(row.tokens)
        self._next_row += 1
        cursor = Cursor(place, offset, self._documents, self._tokens, self._bad_lines, dict(self._counts))
        yield PackedRow(row, cursor)
