"""Packing and the split are pure: rows are the documents end to end, and any cursor continues to the same rows."""

from __future__ import annotations

import numpy as np
import pytest

from potstill.common.errors import UserError
from potstill.teacher_dump.batches import restart_positions
from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.packing.base import Cursor, PackedRow, Packer, PackerStart
from potstill.teacher_dump.packing.cut import CutPacker
from potstill.teacher_dump.split import Split, text_hash
from tests.teacher_dump.tiny import some_texts

LENGTHS = [3, 0, 10, 1, 1, 25, 10, 4, 0, 6]


def documents() -> list[tuple[Place, np.ndarray]]:
    starts = np.cumsum([0, *LENGTHS])
    return [(Place(0, i), np.arange(starts[i], starts[i + 1], dtype=np.int32)) for i in range(len(LENGTHS))]


def pack(packer: Packer) -> list[PackedRow]:
    wanted = [(place, ids) for place, ids in documents() if packer.wants(place)]
    rows = [row for place, ids in wanted for row in packer.add(place, ids, bad_lines=place.record // 3)]
    return [*rows, *packer.finish(Place(1, 0), bad_lines=9)]


@pytest.mark.parametrize("row_length", [2, 7, 10, 60, 1000])
def test_rows_are_the_documents_end_to_end(row_length: int) -> None:
    rows = [packed.row for packed in pack(CutPacker(PackerStart(row_length=row_length)))]
    assert np.array_equal(np.concatenate([row.tokens for row in rows]), np.arange(sum(LENGTHS)))
    assert all(len(row.tokens) == row_length for row in rows[:-1])
    assert all(int(row.doc_lens.sum()) == len(row.tokens) and row.doc_lens.min() > 0 for row in rows)
    assert [row.row for row in rows] == list(range(len(rows)))
    # A span begins where a document begins or a row begins, and nowhere else.
    begins = np.flatnonzero(np.concatenate([restart_positions(row.doc_lens) for row in rows]) == 0)
    expected = {int(s) for s in np.cumsum([0, *LENGTHS])[:-1] if s < sum(LENGTHS)} | set(
        range(0, sum(LENGTHS), row_length)
    )
    assert set(begins.tolist()) == expected


@pytest.mark.parametrize("row_length", [2, 7, 10])
def test_each_cursor_goes_on_to_the_same_rows(row_length: int) -> None:
    whole = pack(CutPacker(PackerStart(row_length=row_length)))
    assert whole[-1].cursor.documents == sum(length > 0 for length in LENGTHS)
    assert whole[-1].cursor.bad_lines == (3 if sum(LENGTHS) % row_length == 0 else 9)
    for done in range(1, len(whole)):
        cursor = Cursor.from_json(whole[done - 1].cursor.to_json())
        assert cursor.tokens == done * row_length
        rest = pack(CutPacker(PackerStart(row_length=row_length, first_row=done, start=cursor)))
        assert [packed.cursor for packed in rest] == [packed.cursor for packed in whole[done:]]
        for a, b in zip(rest, whole[done:], strict=True):
            assert np.array_equal(a.row.tokens, b.row.tokens) and np.array_equal(a.row.doc_lens, b.row.doc_lens)
            assert a.row.row == b.row.row


def test_split_by_fraction_hangs_on_the_text_alone() -> None:
    texts = [f"text {i}" for i in range(4000)]
    split = Split.by_fraction(0.1, salt="a")
    held = {text for text in texts if split.held_out(text)}
    assert abs(len(held) - 400) < 4 * np.sqrt(360)
    assert held == {text for text in reversed(texts) if split.held_out(text)}
    assert held != {text for text in texts if Split.by_fraction(0.1, salt="b").held_out(text)}
    assert not any(Split.by_fraction(0.0, salt="a").held_out(text) for text in texts)


def test_split_by_count_takes_the_smallest_hashes() -> None:
    texts = some_texts(200)
    distinct = sorted(set(texts), key=lambda text: text_hash(text, salt="s"))
    for count in (1, 5, len(distinct)):
        split = Split.by_count(texts + texts[:50], count=count, salt="s")
        assert {text for text in texts if split.held_out(text)} == set(distinct[:count])
    with pytest.raises(UserError, match="holds only"):
        Split.by_count(texts, count=len(distinct) + 1, salt="s")
