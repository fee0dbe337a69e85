"""Token rows -> the arrays a model reads, and the positions whose next token is to be predicted.

Legend: B lines of a batch, L tokens per line, M positions with a target (not the last of a span, nor where the row's
mask says that the next token is not trained on).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from potstill.storage import TokensRow

_STEP = 8


@dataclass(frozen=True)
class TeacherBatch:
    """input_ids, position_ids int64 [B, L]; positions int64 [M] into the flattened [B * L]; labels int64 [M].

    `positions` go row by row, token by token, so that results [M] can be cut by `rows`. Padding (id 0) has positions
    of its own from 0 on, so it is a document of its own that nothing attends to.
    """

    rows: tuple[TokensRow, ...]
    input_ids: np.ndarray
    position_ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray


def restart_positions(doc_lens: np.ndarray) -> np.ndarray:
    """0, 1, .. in each document: int64 [sum of doc_lens]."""
    ends = np.cumsum(doc_lens, dtype=np.int64)
    starts = np.repeat(ends - doc_lens, doc_lens)
    return np.arange(int(ends[-1]) if len(ends) else 0, dtype=np.int64) - starts


def packed_batch(rows: Sequence[TokensRow], *, length: int, fixed: bool = True) -> TeacherBatch:
    """One line per row; documents are told apart by position ids that begin again.

    Lines have `length` tokens, or, where that is not `fixed`, as many as the longest row in steps of 8 (what a GPU's
    products like), `length` at most: rows of whole documents are shorter, and padding would cost a whole token's work.
    """
    if not fixed:
        longest = max((len(row.tokens) for row in rows), default=1)
        length = min(length, -(-longest // _STEP) * _STEP)
    input_ids = np.zeros((len(rows), length), dtype=np.int64)
    position_ids = np.zeros((len(rows), length), dtype=np.int64)
    positions, labels = [], []
    for line, row in enumerate(rows):
        count = len(row.tokens)
        input_ids[line, :count] = row.tokens
        position_ids[line, :count] = restart_positions(row.doc_lens)
        position_ids[line, count:] = np.arange(length - count)
        here = np.flatnonzero(row.has_target())
        positions.append(here + line * length)
        labels.append(row.tokens[here + 1])
    return TeacherBatch(tuple(rows), input_ids, position_ids, _joined(positions), _joined(labels))


def apart_batch(rows: Sequence[TokensRow]) -> TeacherBatch:
    """One line per document, padded on the right to the longest: for models that cannot tell packed documents apart.

    A document of a masked row that has no target has no line, unless the batch would have none at all.
    """
    every = [(row, *span) for row in rows for span in spans_with_targets(row)]
    spans = [span for span in every if span[0].mask is None or len(span[3])] or every[:1]
    length = max((size for _, _, size, _ in spans), default=1)
    input_ids = np.zeros((len(spans), length), dtype=np.int64)
    positions, labels = [], []
    for line, (row, start, size, here) in enumerate(spans):
        input_ids[line, :size] = row.tokens[start : start + size]
        positions.append(here - start + line * length)
        labels.append(row.tokens[here + 1])
    position_ids = np.broadcast_to(np.arange(length, dtype=np.int64), input_ids.shape).copy()
    return TeacherBatch(tuple(rows), input_ids, position_ids, _joined(positions), _joined(labels))


def target_places(rows: Sequence[TokensRow]) -> tuple[np.ndarray, np.ndarray]:
    """Row number and token number of each target position of a batch, int64 [M] each, in the order of the labels."""
    places = [np.flatnonzero(row.has_target()) for row in rows]
    numbers = [np.full(len(here), row.row) for row, here in zip(rows, places, strict=True)]
    return _joined(numbers), _joined(places)


def spans_with_targets(row: TokensRow) -> list[tuple[int, int, np.ndarray]]:
    """(first token, number of tokens, positions in the row that have a target) of each document of a row."""
    found = zip(_spans(row), _targets_by_span(row), strict=True)
    return [(start, size, here) for (start, size), here in found]


def _spans(row: TokensRow) -> list[tuple[int, int]]:
    """(first token, number of tokens) of each document of a row."""
    ends = np.cumsum(row.doc_lens, dtype=np.int64)
    return [(int(end - size), int(size)) for end, size in zip(ends, row.doc_lens, strict=True)]


def _targets_by_span(row: TokensRow) -> list[np.ndarray]:
    """Positions with a target inside each document of a row, counted from the row's beginning."""
    ends = np.cumsum(row.doc_lens, dtype=np.int64)
    here = np.flatnonzero(row.has_target())
    return np.split(here, np.searchsorted(here, ends[:-1]))


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
