"""Rule `cut`: a store's rows are its documents, end to end, cut every L tokens.

A cut document becomes two spans; attention and targets stay inside a span. Because of this plain rule the whole state
at the end of a row is (next document, tokens of it already used), which is what a resumed run needs to know. With masks
a row that trains on nothing is left out.
"""

from __future__ import annotations

from collections.abc import Iterator

from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.packing.base import (
    CountingPacker,
    Cursor,
    Ids,
    Mask,
    PackedRow,
    PackerStart,
    joined_row,
)


class CutPacker(CountingPacker):
    """See Packer."""

    what_is_judged = "rows"

    def __init__(self, made: PackerStart) -> None:
        super().__init__(made)
        self._spans: list[tuple[Ids, Mask | None]] = []
        self._filled = 0

    def add(self, place: Place, ids: Ids, mask: Mask | None = None, *, bad_lines: int = 0) -> Iterator[PackedRow]:
        assert mask is None or self._masked, "the packer was made for documents without masks"
        used = self._used(place)
        if used == 0 and len(ids):
            self._documents += 1
        while used < len(ids):
            take = min(self._row_length - self._filled, len(ids) - used)
            here = slice(used, used + take)
            self._spans.append((ids[here], None if mask is None else mask[here]))
            self._filled += take
            self._tokens += take
            used += take
            if self._filled == self._row_length:
                next_place, offset = (place, used) if used < len(ids) else (Place(place.file, place.record + 1), 0)
                yield from self._take_row(next_place, offset, bad_lines)

    def finish(self, end: Place, *, bad_lines: int) -> Iterator[PackedRow]:
        if self._filled:
            yield from self._take_row(end, 0, bad_lines)

    def last_cursor(self, end: Place, *, bad_lines: int) -> Cursor | None:
        return self._cursor(end, 0, bad_lines) if self._masked else None

    def _take_row(self, place: Place, offset: int, bad_lines: int) -> Iterator[PackedRow]:
        row = joined_row(self._next_row, self._spans)
        self._spans, self._filled = [], 0
        if self._masked and not self._judge(int(row.has_target().sum())):
            self._tokens -= len(row.tokens)
            return
        self._next_row += 1
        yield PackedRow(row, self._cursor(place, offset, bad_lines))


make = CutPacker
