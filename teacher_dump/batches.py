"""Token rows -> the arrays a model reads, and the positions whose next token is to be predicted.

Legend: B lines of a batch, L tokens per line, M positions with a target (all but the last of each span).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from potstill.storage import TokensRow

NO_LABEL = -100


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


def target_mask(doc_lens: np.ndarray) -> np.ndarray:
    """bool [n]: True where the next token belongs to the same span."""
    mask = np.ones(int(doc_lens.sum()), dtype=bool)
    mask[np.cumsum(doc_lens, dtype=np.int64)[doc_lens > 0] - 1] = False
    return mask


def packed_batch(rows: Sequence[TokensRow], *, length: int) -> TeacherBatch:
    """One line of `length` per row; documents are told apart by position ids that begin again."""
    input_ids = np.zeros((len(rows), length), dtype=np.int64)
    position_ids = np.zeros((len(rows), length), dtype=np.int64)
    positions, labels = [], []
    for line, row in enumerate(rows):
        count = len(row.tokens)
        input_ids[line, :count] = row.tokens
        position_ids[line, :count] = restart_positions(row.doc_lens)
        position_ids[line, count:] = np.arange(length - count)
        here = np.flatnonzero(target_mask(row.doc_lens))
        positions.append(here + line * length)
        labels.append(row.tokens[here + 1])
    return TeacherBatch(tuple(rows), input_ids, position_ids, _joined(positions), _joined(labels))


def apart_batch(rows: Sequence[TokensRow]) -> TeacherBatch:
    """One line per document, padded on the right to the longest: for models that cannot tell packed documents apart."""
    spans = [(row, start, int(size)) for row in rows for start, size in _spans(row.doc_lens)]
    length = max((size for _, _, size in spans), default=1)
    input_ids = np.zeros((len(spans), length), dtype=np.int64)
    positions, labels = [], []
    for line, (row, start, size) in enumerate(spans):
        tokens = row.tokens[start : start + size]
        input_ids[line, :size] = tokens
        positions.append(np.arange(size - 1) + line * length)
        labels.append(tokens[1:])
    position_ids = np.broadcast_to(np.arange(length, dtype=np.int64), input_ids.shape).copy()
    return TeacherBatch(tuple(rows), input_ids, position_ids, _joined(positions), _joined(labels))


def target_places(rows: Sequence[TokensRow]) -> tuple[np.ndarray, np.ndarray]:
    """Row number and token number of each target position of a batch, int64 [M] each, in the order of the labels."""
    places = [np.flatnonzero(target_mask(row.doc_lens)) for row in rows]
    numbers = [np.full(len(here), row.row) for row, here in zip(rows, places, strict=True)]
    return _joined(numbers), _joined(places)


def _spans(doc_lens: np.ndarray) -> list[tuple[int, int]]:
    ends = np.cumsum(doc_lens, dtype=np.int64)
    return [(int(end - size), int(size)) for end, size in zip(ends, doc_lens, strict=True) if size > 0]


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
