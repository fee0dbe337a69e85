"""Rule `rows`: a record of the input is a row, its documents the row's spans; any cursor continues to the same rows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.packing.base import JUDGED, TOO_LONG, UNTRAINED, Cursor, PackedRow, PackerStart
from potstill.teacher_dump.packing.rows import make

PARTS = 8
Records = list[list[list[bool]]]  # of a record, the masks of its documents


def packed(start: PackerStart, records: Records) -> tuple[list[PackedRow], object]:
    packer = make(start)
    rows = []
    for number, documents in enumerate(records):
        for part, bits in enumerate(documents):
            place = Place(0, number * PARTS + part)
            ids = 1000 * number + 100 * part + np.arange(len(bits), dtype=np.int32)
            if packer.wants(place):
                mask = np.array(bits, np.bool_) if start.masked else None
                rows += packer.add(place, ids, mask, bad_lines=number // 2)
    rows += packer.finish(Place(1, 0), bad_lines=99)
    return rows, (packer.documents, packer.tokens, dict(packer.counts))


some_records = st.lists(st.lists(st.lists(st.booleans(), max_size=7), min_size=1, max_size=4), max_size=8)


@settings(max_examples=60, deadline=None)
@given(some_records, st.integers(2, 12), st.booleans())
def test_records_are_rows_and_cursors_replay_them(records: Records, row_length: int, masked: bool) -> None:
    rows, totals = packed(PackerStart(row_length=row_length, masked=masked, parts=PARTS), records)
    wanted, untrained, judged = [], 0, 0
    for number, documents in enumerate(records):
        flat = [(part, place, on) for part, bits in enumerate(documents) for place, on in enumerate(bits)]
        for first in range(0, len(flat), row_length):
            piece = flat[first : first + row_length]
            judged += 1
            targets = [on for before, (part, _, on) in pairwise(piece) if before[0] == part]
            if masked and not any(targets):
                untrained += 1
                continue
            lens = [sum(one[0] == part for one in piece) for part in range(len(documents))]
            wanted.append(([1000 * number + 100 * part + place for part, place, _ in piece], [n for n in lens if n]))
    assert [(one.row.tokens.tolist(), one.row.doc_lens.tolist()) for one in rows] == wanted
    assert [one.row.row for one in rows] == list(range(len(wanted)))
    documents_seen, tokens, counts = totals  # type: ignore[misc]
    assert documents_seen == sum(len(bits) > 0 for documents in records for bits in documents)
    assert tokens == sum(len(ids) for ids, _ in wanted)
    assert counts[TOO_LONG] == sum(len(bits) > row_length for documents in records for bits in documents)
    if masked:
        assert (counts[JUDGED], counts[UNTRAINED]) == (judged, untrained)
    for done in range(1, len(rows)):
        cursor = Cursor.from_json(rows[done - 1].cursor.to_json())
        start = PackerStart(row_length=row_length, masked=masked, parts=PARTS, first_row=done, start=cursor)
        rest, again = packed(start, records)
        assert [one.cursor for one in rest] == [one.cursor for one in rows[done:]]
        assert [one.row.tokens.tolist() for one in rest] == [one.row.tokens.tolist() for one in rows[done:]]
        assert again == totals
