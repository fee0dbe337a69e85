"""Rule `cut`: a store's rows are its documents, end to end, cut every L tokens.

A cut document becomes two spans; attention and targets stay inside a span. Because of this plain rule the whole state
at the end of a row is (next document, tokens of it already used), which is what a resumed run needs to know. With masks
a row that trains on nothing is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.packing.base import (
    JUDGED,
    TRAINED,
    UNTRAINED,
    Cursor,
    Ids,
    Mask,
    PackedRow,
    PackerStart,
    joined_row,
)


class CutPacker:
    """See Packer."""

    what_is_judged = "rows"

    def __init__(self, made: PackerStart) -> None:
        self._row_length, self._masked = made.row_length, made.masked
        self._next_row = made.first_row
        self._start = made.start
        self._spans: list[tuple[Ids, Mask | None]] = []
        self._filled = 0
        self._documents = made.start.documents if made.start else 0
        self._tokens = made.start.tokens if made.start else 0
        more = made.start.more if made.start else {}
        self._counts = {name: more.get(name, 0) for name in (TRAINED, JUDGED, UNTRAINED)} if made.masked else {}

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
        used = 0
        if self._start is not None and place == self._start.place:
            used = self._start.offset
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
        if not self._masked:
            return None
        return Cursor(end, 0, self._documents, self._tokens, bad_lines, dict(self._counts))

    def _take_row(self, place: Place, offset: int, bad_lines: int) -> Iterator[PackedRow]:
        row = joined_row(self._next_row, self._spans)
        self._spans, self._filled = [], 0
        if self._masked:
            trained = int(row.has_target().sum())
            self._counts[JUDGED] += 1
            self._counts[TRAINED] += trained
            if not trained:
                self._counts[UNTRAINED] += 1
                self._tokens -= len(row.tokens)
                return
        self._next_row += 1
        yield PackedRow(row, Cursor(place, offset, self._documents, self._tokens, bad_lines, dict(self._counts)))


make = CutPacker
