"""What is asked of a tokens store: each document's prompt, and the reference that stands behind it.

A document's prompt is what comes before its first trained token, its reference the run of trained tokens from there on
(of a conversation with several turns that is the first answer).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from potstill.common.answer_text import answer_limit, first_end
from potstill.common.errors import UserError
from potstill.storage import StoreReader, TokensRow

Ids = NDArray[np.int32]
DOCUMENT_BITS = 20  # of a unit of the draws: row, then document
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Question:
    """prompt int32 [n], reference int32 [m]; `unit` names the document to the draws.

    ends: place of the reference's first stop id, or None where it has none (a store without end marks, a document that
    was cut): answers are then no longer than the reference, since nothing else ends them at the right place.
    """

    unit: int
    prompt: Ids
    reference: Ids
    ends: int | None

    def limit(self, max_new_tokens: int, row_length: int) -> int:
        """New tokens at most: a prompt with its answer fits in a row."""
        most = answer_limit(max_new_tokens, reference=len(self.reference), has_end=self.ends is not None)
        return min(most, row_length - len(self.prompt))


@dataclass(frozen=True)
class Survey:
    """What a whole store asks. longest: tokens of the longest reference; row_documents: most questions in a row."""

    num_documents: int
    num_questions: int
    longest: int
    row_documents: int
    row_length: int


def questions_of(row: TokensRow, stop_ids: frozenset[int], *, store: str) -> list[Question | None]:
    """One for each document of the row; None where nothing is trained on. Raises UserError where there is no prompt."""
    found: list[Question | None] = []
    starts = np.cumsum(row.doc_lens) - row.doc_lens
    for number, (start, size) in enumerate(zip(starts.tolist(), row.doc_lens.tolist(), strict=True)):
        tokens = row.tokens[start : start + size]
        mask = np.ones(size, np.bool_) if row.mask is None else row.mask[start : start + size]
        if not mask.any():
            found.append(None)
            continue
        first = int(mask.argmax())
        if first == 0:
            raise UserError(
                f"{store}: row {row.row}, document {number} has no prompt: its first token is trained on already. "
                "rollout needs prompts that are masked off, with an answer behind each; prepare the data with "
                "--prompt-field and --response-field, or as conversations"
            )
        rest = mask[first:]
        last = size if rest.all() else first + int(rest.argmin())
        reference = tokens[first:last]
        unit = row.row << DOCUMENT_BITS | number
        found.append(Question(unit, tokens[:first], reference, first_end(reference.tolist(), stop_ids)))
    return found


def require_masks(reader: StoreReader) -> None:
    """Raise UserError where a store has no masks."""
    if not reader.spec.stores("mask"):
        raise UserError(
            f"{reader.url} has no masks, so nothing says what is a prompt and what its answer; prepare the data with "
            "--prompt-field and --response-field, or as conversations"
        )


def survey(reader: StoreReader, stop_ids: frozenset[int]) -> Survey:
    """Read the whole store once. Raises UserError where it has no masks, nothing to answer, or no prompt somewhere."""
    require_masks(reader)
    documents = asked = longest = most = 0
    for row in all_rows(reader):
        if len(row.doc_lens) >= 1 << DOCUMENT_BITS:
            raise UserError(f"{reader.url}: row {row.row} has {len(row.doc_lens)} documents; expected below 2^20")
        found = [one for one in questions_of(row, stop_ids, store=reader.url) if one is not None]
        documents, asked = documents + len(row.doc_lens), asked + len(found)
        longest = max([longest, *(len(one.reference) for one in found)])
        most = max(most, len(found))
    if not asked:
        raise UserError(f"{reader.url}: none of its {documents} documents has a token that is trained on")
    return Survey(documents, asked, longest, most, reader.spec.row_length)


def all_rows(reader: StoreReader) -> Iterator[TokensRow]:
    """The rows of a tokens store in order, some at a time."""
    for first in range(0, reader.num_rows, _ROWS_AT_ONCE):
        rows = reader.rows(range(first, min(first + _ROWS_AT_ONCE, reader.num_rows)))
        yield from cast("list[TokensRow]", rows)
