"""The three kinds of rows that a store can hold, and the digest that ties them to their tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from potstill.storage.rows.array_types import Float32, Int32
from potstill.storage.rows.column import Array
from potstill.storage.rows.sparse_targets import SparseTargets

NO_LABEL = -100  # what torch's cross_entropy ignores


@dataclass(frozen=True, eq=False)
class TokensRow:
    """A packed sequence: tokens [n] int32 split in documents of lengths doc_lens [d] int32 (sum n).

    mask bool [n]: whether a token is trained on, that is, whether it is a label (of the position before it) and gets a
    target; None: every token is. A row may have fewer tokens than its store's row_length: nothing is stored of padding.
    more: arrays of further columns by name (storage/rows/tokens_columns.py).
    stored_digest: digest of the tokens as their store holds them, where their ids were renamed since; else None.
    """

    row: int
    tokens: Int32
    doc_lens: Int32
    mask: NDArray[np.bool_] | None = None
    more: Mapping[str, Array] = field(default_factory=dict)
    stored_digest: int | None = None

    def column(self, name: str) -> Array | None:
        """The array of a column besides tokens and documents, None where the row has none."""
        return self.mask if name == "mask" else self.more.get(name)

    def digest(self) -> int:
        """What targets and scores of this row carry as token_digest: of the tokens as they are stored."""
        return token_digest(self.tokens, self.doc_lens) if self.stored_digest is None else self.stored_digest

    def position_ids(self) -> NDArray[np.int64]:
        """0, 1, 2, ... from each document's first token on, [n] int64."""
        lens = self.doc_lens.astype(np.int64)
        return np.arange(len(self.tokens), dtype=np.int64) - np.repeat(np.cumsum(lens) - lens, lens)

    def labels(self) -> NDArray[np.int64]:
        """The next token of the same document, [n] int64; NO_LABEL (-100) where `has_target` is not."""
        labels = np.empty(len(self.tokens), np.int64)
        labels[:-1] = self.tokens[1:]
        labels[~self.has_target()] = NO_LABEL
        return labels

    def has_target(self) -> NDArray[np.bool_]:
        """Whether position t predicts something, [n] bool: token t + 1 is of the same document and is trained on."""
        found = np.ones(len(self.tokens), np.bool_)
        if self.mask is not None:
            found[:-1] = self.mask[1:]
        found[np.cumsum(self.doc_lens) - 1] = False
        return found


@dataclass(frozen=True, eq=False)
class TargetsRow:
    """Teacher targets of one row; `token_digest` pins the tokens they were computed on."""

    row: int
    token_digest: int
    targets: SparseTargets
    stats: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ScoresRow:
    """Per-token scores of a small language model, and per-row statistics for the index.

    more: further columns by name, float32 [d], one value per document (storage/rows/scores_columns.py).
    """

    row: int
    token_digest: int
    label_logprob: Float32
    label_rank: Int32
    entropy: Float32
    stats: Mapping[str, float] = field(default_factory=dict)
    more: Mapping[str, Array] = field(default_factory=dict)


Row = TokensRow | TargetsRow | ScoresRow


def token_digest(tokens: Int32, doc_lens: Int32) -> int:
    """64-bit digest of a row's tokens and document bounds (blake2b-8 over little-endian int32)."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(np.array([len(tokens), len(doc_lens)], dtype="<u4").tobytes())
    digest.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(doc_lens, dtype="<i4").tobytes())
    return int.from_bytes(digest.digest(), "little")
