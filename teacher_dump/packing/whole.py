"""Rule `whole`: whole documents in a row, by best-fit decreasing over closed windows of the stream.

A window holds a fixed number of documents. From the longest to the shortest, each goes into the fullest row that still
has room for it, or begins a row (best-fit decreasing; H. Ding et al., "Fewer Truncations Improve Language Modeling",
arXiv 2404.10830, section 3, who pack pieces of at most L tokens in this way). The rows of a window, and the documents
inside a row, stand in the order of the stream. A row may be shorter than L: what it lacks is stored nowhere.

A document above L tokens is, by choice (`too_long`), split into pieces of L tokens and a rest, each a document from
then on; cut to its first L tokens; or dropped. With masks, what trains on nothing is left out.

A cursor inside a window is the window's beginning and how many of its rows are there: a later run packs the same window
again and leaves those out. Memory holds one window.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import replace

from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.packing.base import (
    LOST_TOKENS,
    TOO_LONG,
    WINDOW_ROWS,
    CountingPacker,
    Cursor,
    Ids,
    Mask,
    PackedRow,
    PackerStart,
    joined_row,
)


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the items in each bin: bins in the order of their first item, items in ascending order.

    lengths: each 1 to capacity. Equal lengths go in the order given, and of rows equally full the newest is taken.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, number of the bin), ascending; full bins are not listed
    for item in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[item]
        place = bisect.bisect_left(room, (length, -len(bins)))
        if place < len(room):
            left, key = room.pop(place)
        else:
            left, key = capacity, -len(bins)
            bins.append([])
        bins[-key].append(item)
        if left > length:
            bisect.insort(room, (left - length, key))
    return sorted(sorted(items) for items in bins)


class WholePacker(CountingPacker):
    """See Packer."""

    what_is_judged = "documents"

    def __init__(self, made: PackerStart) -> None:
        super().__init__(made, counted=(TOO_LONG, LOST_TOKENS))
        self._size, self._too_long = made.window, made.too_long
        self._window: list[tuple[Ids, Mask | None]] = []
        self._rows_there = (
            made.start.more.get(WINDOW_ROWS, 0) if made.start else 0
        )  # of the first window, in the store already
        self._mark = Cursor(Place(0, 0), 0, 0, 0, 0)  # beginning of the window

    def add(self, place: Place, ids: Ids, mask: Mask | None = None, *, bad_lines: int = 0) -> Iterator[PackedRow]:
        assert mask is None or self._masked, "the packer was made for documents without masks"
        used = self._used(place)
        while used < len(ids):
            if not self._window:
                self._mark = self._cursor(place, used, bad_lines)
            if used == 0:
                self._begin(len(ids))
            here = slice(used, used + self._row_length)
            used = len(ids) if self._too_long != "split" else min(here.stop, len(ids))
            if self._too_long == "drop" and len(ids) > self._row_length:
                return
            # A copy, so that the window does not hold the rest of a document that is cut.
            part = ids[here].copy(), None if mask is None else mask[here].copy()
            if not self._trains(part):
                continue
            self._window.append(part)
            self._tokens += len(part[0])
            if len(self._window) == self._size:
                after = (place, used) if used < len(ids) else (Place(place.file, place.record + 1), 0)
                yield from self._close(self._cursor(*after, bad_lines))

    def finish(self, end: Place, *, bad_lines: int) -> Iterator[PackedRow]:
        if self._window:
            yield from self._close(self._cursor(end, 0, bad_lines))

    def last_cursor(self, end: Place, *, bad_lines: int) -> Cursor | None:
        return self._cursor(end, 0, bad_lines)

    def _begin(self, num_tokens: int) -> None:
        self._documents += 1
        if num_tokens > self._row_length:
            self._counts[TOO_LONG] += 1
            kept = {"split": num_tokens, "cut": self._row_length, "drop": 0}[self._too_long]
            self._counts[LOST_TOKENS] += num_tokens - kept

    def _trains(self, part: tuple[Ids, Mask | None]) -> bool:
        """Whether a document has a target: its first token is predicted by nothing."""
        if not self._masked:
            return True
        return self._judge(len(part[0]) - 1 if part[1] is None else int(part[1][1:].sum()))

    def _close(self, after: Cursor) -> Iterator[PackedRow]:
        """Rows of the window, but for those that the store has; the last one's cursor is `after` the window."""
        window, self._window = self._window, []
        there, self._rows_there = self._rows_there, 0
        bins = best_fit_decreasing([len(ids) for ids, _ in window], self._row_length)
        for number, items in enumerate(bins):
            if number < there:
                continue
            more = {**self._mark.more, WINDOW_ROWS: number + 1}
            cursor = after if number + 1 == len(bins) else replace(self._mark, more=more)
            yield PackedRow(joined_row(self._next_row, [window[item] for item in items]), cursor)
            self._next_row += 1


make = WholePacker
