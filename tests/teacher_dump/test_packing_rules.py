"""Both packing rules by properties: each token of each kept document once, masks follow tokens, cursors replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.packing.base import (
    JUDGED,
    LOST_TOKENS,
    TOO_LONG,
    TRAINED,
    UNTRAINED,
    WINDOW_ROWS,
    Cursor,
    PackedRow,
    Packer,
    PackerStart,
)
from potstill.teacher_dump.packing.cut import CutPacker
from potstill.teacher_dump.packing.whole import WholePacker, best_fit_decreasing

PACKERS = {"cut": CutPacker, "whole": WholePacker}


class Made(NamedTuple):
    """A document of the tests: its ids say which it is and where in it they stand."""

    ids: np.ndarray
    mask: np.ndarray | None


def document(number: int, bits: Sequence[bool], *, masked: bool) -> Made:
    return Made(number * 1000 + np.arange(len(bits), dtype=np.int32), np.array(bits, np.bool_) if masked else None)


def packed(packer: Packer, documents: Sequence[Made]) -> list[PackedRow]:
    rows = []
    for number, (ids, mask) in enumerate(documents):
        if packer.wants(Place(0, number)):
            rows += packer.add(Place(0, number), ids, mask, bad_lines=number // 2)
    return [*rows, *packer.finish(Place(1, 0), bad_lines=99)]


def pieces(documents: Sequence[Made], row_length: int, too_long: str) -> list[Made]:
    """What rule `whole` has to put into rows, in order."""
    found = []
    for ids, mask in documents:
        if too_long == "drop" and len(ids) > row_length:
            continue
        stop = min(len(ids), row_length) if too_long == "cut" else len(ids)
        cuts = range(0, stop, row_length)
        found += [Made(ids[i : i + row_length], None if mask is None else mask[i : i + row_length]) for i in cuts]
    return [piece for piece in found if piece.mask is None or piece.mask[1:].any()]


lists_of_bits = st.lists(st.lists(st.booleans(), max_size=14), max_size=25)


@settings(max_examples=60, deadline=None)
@given(lists_of_bits, st.booleans(), st.integers(2, 9), st.integers(1, 6), st.sampled_from(["split", "cut", "drop"]))
def test_whole_documents_stand_in_one_row_once(
    bits: list[list[bool]], masked: bool, row_length: int, window: int, too_long: str
) -> None:
    documents = [document(number, one, masked=masked) for number, one in enumerate(bits)]
    options = {"row_length": row_length, "masked": masked, "window": window, "too_long": too_long}
    packer = WholePacker(PackerStart(**options))  # type: ignore[arg-type]
    whole = packed(packer, documents)
    spans = []
    for number, (row, _) in enumerate((one.row, one.cursor) for one in whole):
        assert row.row == number and len(row.tokens) <= row_length and row.doc_lens.sum() == len(row.tokens)
        assert (row.mask is not None) == masked
        cuts = np.cumsum(row.doc_lens)[:-1]
        masks = [None] * len(row.doc_lens) if row.mask is None else np.split(row.mask, cuts)
        spans += [Made(*pair) for pair in zip(np.split(row.tokens, cuts), masks, strict=True)]
    wanted = pieces(documents, row_length, too_long)
    spans.sort(key=lambda span: int(span.ids[0]))
    assert [span.ids.tolist() for span in spans] == [piece.ids.tolist() for piece in wanted]
    if masked:
        assert [span.mask.tolist() for span in spans] == [piece.mask.tolist() for piece in wanted]  # type: ignore[union-attr]
    assert packer.tokens == sum(len(piece.ids) for piece in wanted)
    assert packer.documents == sum(len(one.ids) > 0 for one in documents)
    long = [len(one.ids) for one in documents if len(one.ids) > row_length]
    lost = {"split": 0, "cut": sum(long) - len(long) * row_length, "drop": sum(long)}[too_long]
    assert (packer.counts[TOO_LONG], packer.counts[LOST_TOKENS]) == (len(long), lost)
    # Rows of a window stand together: no document is far from where the stream has it.
    order = [int(one.row.tokens[0]) for one in whole]
    windows = [[int(piece.ids[0]) for piece in wanted[i : i + window]] for i in range(0, len(wanted), window)]
    assert order == [first for group in windows for first in order if first in group]


@settings(max_examples=60, deadline=None)
@given(lists_of_bits, st.integers(2, 9))
def test_masks_of_cut_rows_follow_their_tokens(bits: list[list[bool]], row_length: int) -> None:
    documents = [document(number, one, masked=True) for number, one in enumerate(bits)]
    packer = CutPacker(PackerStart(row_length=row_length, masked=True))
    plain = packed(CutPacker(PackerStart(row_length=row_length)), [Made(ids, None) for ids, _ in documents])
    mask_of = {int(token): bool(on) for ids, mask in documents for token, on in zip(ids, mask, strict=True)}  # type: ignore[arg-type]
    wanted = []
    for one in plain:
        mask = np.array([mask_of[int(token)] for token in one.row.tokens], np.bool_)
        first = np.cumsum(one.row.doc_lens) - one.row.doc_lens
        predicted = mask.copy()
        predicted[first] = False  # nothing stands before it
        if predicted.any():
            wanted.append((one.row.tokens.tolist(), one.row.doc_lens.tolist(), mask.tolist(), int(predicted.sum())))
    found = packed(packer, documents)
    assert (
        [(r.tokens.tolist(), r.doc_lens.tolist(), r.mask.tolist()) for r in (o.row for o in found)]
        == [  # type: ignore[union-attr]
            one[:3] for one in wanted
        ]
    )
    assert [one.row.row for one in found] == list(range(len(wanted)))
    counts = packer.counts
    assert (counts[JUDGED], counts[UNTRAINED]) == (len(plain), len(plain) - len(wanted))
    assert counts[TRAINED] == sum(one[3] for one in wanted)
    assert packer.tokens == sum(len(one[0]) for one in wanted)


@settings(max_examples=40, deadline=None)
@given(
    lists_of_bits,
    st.booleans(),
    st.sampled_from(["cut", "whole"]),
    st.integers(2, 9),
    st.integers(1, 6),
    st.sampled_from(["split", "cut", "drop"]),
)
def test_each_cursor_continues_to_the_same_rows(
    bits: list[list[bool]], masked: bool, rule: str, row_length: int, window: int, too_long: str
) -> None:
    documents = [document(number, one, masked=masked) for number, one in enumerate(bits)]
    options = {"row_length": row_length, "masked": masked, "window": window, "too_long": too_long}
    packer = PACKERS[rule](PackerStart(**options))  # type: ignore[arg-type]
    whole = packed(packer, documents)
    for done in range(1, len(whole)):
        cursor = Cursor.from_json(whole[done - 1].cursor.to_json())
        again = PACKERS[rule](PackerStart(**options, first_row=done, start=cursor))  # type: ignore[arg-type]
        rest = packed(again, documents)
        assert [one.cursor for one in rest] == [one.cursor for one in whole[done:]]
        for a, b in zip(rest, whole[done:], strict=True):
            assert a.row.row == b.row.row and np.array_equal(a.row.tokens, b.row.tokens)
            assert np.array_equal(a.row.doc_lens, b.row.doc_lens)
            assert masked == (a.row.mask is not None) and np.array_equal(a.row.mask, b.row.mask)  # type: ignore[arg-type]
        assert (again.documents, again.tokens, again.counts) == (packer.documents, packer.tokens, packer.counts)


def test_best_fit_decreasing() -> None:
    # Longest first: 7; 6; 4 into the row with 4 left (6); 3 fills the row of 7; 2 and 1 begin and fill another.
    assert best_fit_decreasing([3, 6, 1, 7, 4, 2], 10) == [[0, 3], [1, 4], [2, 5]]
    assert best_fit_decreasing([5, 5, 5], 10) == [[0, 1], [2]]
    assert best_fit_decreasing([], 10) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_decreasing_fills_rows(lengths: list[int]) -> None:
    bins = best_fit_decreasing(lengths, 20)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    loads = [sum(lengths[item] for item in items) for items in bins]
    assert all(load <= 20 for load in loads)
    # 11/9 of the best, and no two rows could be one (Johnson et al. 1974).
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // 20) + 1 or sum(sorted(loads)[:2]) > 20


def test_masks_without_a_masked_packer_are_a_mistake() -> None:
    with pytest.raises(AssertionError, match="without masks"):
        list(CutPacker(PackerStart(row_length=4)).add(Place(0, 0), np.zeros(2, np.int32), np.ones(2, np.bool_)))


def test_a_cursor_of_a_plain_store_has_no_further_keys() -> None:
    """Records of stores without masks, cut, are those of earlier versions."""
    (one, *_) = packed(CutPacker(PackerStart(row_length=4)), [document(0, [True] * 9, masked=False)])
    assert set(one.cursor.to_json()) == {"file", "record", "offset", "documents", "tokens", "bad_lines"}
    (other, *_) = packed(
        WholePacker(PackerStart(row_length=4)), [document(n, [True] * 3, masked=False) for n in (0, 1)]
    )
    assert other.cursor.to_json()[WINDOW_ROWS] == 1
