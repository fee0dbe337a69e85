"""Rule `rows`: each record of the input is a row of its own, with the bounds of the documents inside it.

For sets whose records are rows already. A record of more than L tokens is split into several rows, or, with `too_long`
cut, ends after its first L tokens: a piece of an answer without its prompt is no text. A row may be shorter than L:
what it lacks is stored nowhere. With masks a row that trains on nothing is left out.
"""

from __future__ import annotations

from collections.abc import Iterator

from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.packing.base import (
    LOST_TOKENS,
    TOO_LONG,
    CountingPacker,
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


class RecordPacker(CountingPacker):
    """See Packer."""

    what_is_judged = "rows"

    def __init__(self, made: PackerStart) -> None:
        super().__init__(made, counted=(TOO_LONG, LOST_TOKENS))
        self._parts, self._cuts = made.parts, made.too_long == "cut"
        self._spans: list[tuple[Ids, Mask | None]] = []
        self._filled = 0
        self._last = Place(0, -1)  # of the document that was added last
        self._bad_lines = 0

    def add(self, place: Place, ids: Ids, mask: Mask | None = None, *, bad_lines: int = 0) -> Iterator[PackedRow]:
        assert mask is None or self._masked, "the packer was made for documents without masks"
        if (place.file, place.record // self._parts) != (self._last.file, self._last.record // self._parts):
            yield from self._take_row(Place(self._last.file, self._last.record + 1), 0)
        self._last, self._bad_lines = place, bad_lines
        used = self._used(place)
        while used < len(ids):
            if self._filled == self._row_length and not self._cuts:
                yield from self._take_row(place, used)
            if used == 0:  # after the row before it, whose cursor does not count it
                self._documents += 1
                self._counts[TOO_LONG] += len(ids) > self._row_length
            take = min(self._row_length - self._filled, len(ids) - used)
            if not take:
                self._counts[LOST_TOKENS] += len(ids) - used
                return
            here = slice(used, used + take)
            self._spans.append((ids[here], None if mask is None else mask[here]))
            self._filled += take
            used += take

    def finish(self, end: Place, *, bad_lines: int) -> Iterator[PackedRow]:
        self._bad_lines = bad_lines
        yield from self._take_row(end, 0)

    def last_cursor(self, end: Place, *, bad_lines: int) -> Cursor | None:
        return self._cursor(end, 0, bad_lines)

    def _take_row(self, place: Place, offset: int) -> Iterator[PackedRow]:
        """The row that is there, if any; a later run continues at token `offset` of the document at `place`."""
        if not self._spans:
            return
        row = joined_row(self._next_row, self._spans)
        self._spans, self._filled = [], 0
        if self._masked and not self._judge(int(row.has_target().sum())):
            return
        self._tokens += len(row.tokens)
        self._next_row += 1
        yield PackedRow(row, self._cursor(place, offset, self._bad_lines))
