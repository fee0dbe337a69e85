"""Bytes of the text that held-out positions stand for: what turns a loss in nats per token into bits per byte.

Models with different tokenizers are only comparable per byte of text. A position counts the bytes of its label, the
token that is predicted there, so the first token of a document is left out on both sides of the ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from potstill.common.token_table import token_table
from potstill.storage import StoreReader, TokensRow
from potstill.student_train.data.store_tokenizer import find_tokenizer_of, named_tokenizer

ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class TextBytes:
    """Bytes of the measured text, or None and the reason why they are not known."""

    num_bytes: int | None
    reason: str | None = None

    def bits_per_byte(self, *, loss: float, positions: float) -> float | None:
        """`loss` in nats per position, as bits per byte of text."""
        return loss * positions / (math.log(2.0) * self.num_bytes) if self.num_bytes else None


def heldout_bytes(
    tokens: StoreReader, *, num_rows: int, asked: Path | None, candidates: Sequence[Path | None]
) -> TextBytes:
    """Count the bytes of the labels of the first `num_rows` rows.

    With the tokenizer in `asked`, which must be that of the store (UserError otherwise), else with the first of
    `candidates` that is. Exact for byte-level tokenizers; one too many for a document that begins with a bos token in
    sentencepiece; with any other kind, the bytes that the labels add to the documents as the tokenizer writes them.
    """
    wanted = tokens.spec.tokenizer_digest
    if asked is not None:
        return _counted(tokens, named_tokenizer(asked, digest=wanted, store=tokens.url), num_rows)
    tokenizer, others = find_tokenizer_of(wanted, candidates)
    if tokenizer is not None:
        return _counted(tokens, tokenizer, num_rows)
    told = f" ({'; '.join(others)})" if others else ""
    return TextBytes(None, f"no tokenizer of the rows beside the model or the store{told}; name it with tokenizer")


def _counted(tokens: StoreReader, tokenizer: Any, num_rows: int) -> TextBytes:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    table = None if backend is None else token_table(backend.to_str())
    total = 0
    if table is not None and table.kind != "other":
        sizes = np.zeros(tokens.spec.vocab_size, np.int64)  # [V]
        for token, piece in table.pieces.items():
            if token < len(sizes) and token not in table.special:
                sizes[token] = len(piece)
    for first in range(0, num_rows, ROWS_AT_ONCE):
        for row in cast("list[TokensRow]", tokens.rows(range(first, min(first + ROWS_AT_ONCE, num_rows)))):
            if table is not None and table.kind != "other":
                labels = row.labels()
                total += int(sizes[labels[labels >= 0]].sum())
            else:
                total += _written_bytes(row, tokenizer)
    return TextBytes(total) if total else TextBytes(None, "the measured tokens are all special: they stand for no text")


def _written_bytes(row: TokensRow, tokenizer: Any) -> int:
    """Bytes of the labels in a row as the tokenizer writes its documents: what each run of labels adds to the text."""
    total, start = 0, 0
    for size in row.doc_lens.tolist():
        ids = row.tokens[start : start + size].tolist()
        is_label = row.has_target()[start : start + size - 1]  # of the tokens behind the first
        start += size
        # Where labels begin and end; without a mask that is one run from the second token to the last.
        edges = np.flatnonzero(np.diff(np.concatenate([[False], is_label, [False]]).astype(np.int8))) + 1
        for first, last in edges.reshape(-1, 2).tolist():
            whole, head = (
                tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                for part in (ids[:last], ids[:first])
            )
            total += len(whole.encode()) - len(head.encode())
    return total
