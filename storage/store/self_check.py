"""Checks before the first step: does a student fit a store, and do targets sit at the right positions?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from potstill.storage.errors import MismatchError
from potstill.storage.loading.order import permute
from potstill.storage.rows.alignment import BESIDE, LabelAgreement, check_row_alignment, check_row_places
from potstill.storage.rows.first_choices import FirstChoices, first_choices
from potstill.storage.rows.row_types import TargetsRow, TokensRow
from potstill.storage.store.held_rows import held_rows
from potstill.storage.store.reader import StoreReader

_POSITIONS, _ROWS_AT_MOST = 1 << 13, 64  # that are counted where there are no labels


@dataclass(frozen=True)
class AlignmentReport:
    """How many labels were found among the kept entries, and how many agreed with the label column.

    first_choices: what was counted where labels cannot tell, else None.
    """

    num_rows: int
    num_labels: int
    num_kept: int
    num_agreeing: int
    first_choices: FirstChoices | None = None

    @property
    def is_certain(self) -> bool:
        """Whether the sample shows that the targets stand at their tokens, rather than merely not that they do not."""
        return self.first_choices is None or self.first_choices.stands_right


def check_student(reader: StoreReader, *, vocab_size: int, tokenizer_digest: str, context_length: int) -> None:
    """Raise MismatchError unless a student can train on the store; a larger (padded) head is fine.

    tokenizer_digest: of the tokenizer that the student takes the rows to be made with, also where the reader renames
    their ids since.
    """
    spec = reader.spec
    if tokenizer_digest != spec.tokenizer_digest:
        raise MismatchError(
            f"{reader.url}: tokenizer digest {spec.tokenizer_digest} is not the student's {tokenizer_digest}; "
            "the same vocabulary size does not make the ids mean the same"
        )
    if vocab_size < reader.vocab_size:
        raise MismatchError(f"{reader.url}: ids go to {reader.vocab_size - 1}, the student has {vocab_size} outputs")
    if context_length < spec.row_length:
        raise MismatchError(f"{reader.url}: rows of {spec.row_length} tokens, the student reads {context_length}")


def check_alignment(tokens: StoreReader, targets: StoreReader, *, num_rows: int = 16) -> AlignmentReport:
    """See in row 0 and some others that targets stand at their tokens: each row alone, and all of them together.

    The rules are those of `check_row_alignment`, which a student applies to every row that it reads. Without labels the
    first choices of up to 64 rows are counted. Raises MismatchError that names a row or the figures.
    """
    rows = _some_rows(targets, num_rows)
    found, pairs = LabelAgreement(), _pairs(tokens, targets, rows)
    for of_tokens, of_targets in pairs:
        check_row_places(of_tokens, of_targets, where=targets.url)
    for of_tokens, of_targets in pairs:
        found += check_row_alignment(of_tokens, of_targets, where=targets.url)
    problem, chosen = found.problem, None
    if problem is None and not found.can_tell:
        longest = max((len(of_tokens.tokens) for of_tokens, _ in pairs), default=1)
        more = min(_ROWS_AT_MOST, max(num_rows, _POSITIONS // longest))
        chosen = first_choices(_pairs(tokens, targets, _some_rows(targets, more)))
        problem = chosen.text if chosen.stands_beside else None
    if problem is not None:
        raise MismatchError(f"{targets.url}: of {len(rows)} rows, {problem}; {BESIDE}")
    return AlignmentReport(len(rows), found.num_labels, found.num_kept, found.num_compared - found.num_wrong, chosen)


def _pairs(tokens: StoreReader, targets: StoreReader, rows: Sequence[int]) -> list[tuple[TokensRow, TargetsRow]]:
    return list(zip(tokens.tokens_rows(rows), targets.targets_rows(rows), strict=True))


def check_places(tokens: StoreReader, targets: StoreReader, *, num_rows: int = 16) -> None:
    """See in row 0 and some others that no target stands at a position without one (`TokensRow.has_target`).

    That is where the next token is not trained on, by the mask of the row, or is of another document. For targets of
    every kind. Raises MismatchError that names row and position.
    """
    rows = _some_rows(targets, num_rows)
    for found_tokens, found_targets in zip(tokens.tokens_rows(rows), targets.targets_rows(rows), strict=True):
        check_row_places(found_tokens, found_targets, where=targets.url)


def _some_rows(targets: StoreReader, num_rows: int) -> list[int]:
    """Row 0 and at most `num_rows` others, in order; of a store of some rows only, of those that it holds."""
    held = held_rows(targets)
    num_all = targets.num_rows if held is None else len(held)
    num_rows = min(num_rows + 1, num_all)
    picks = permute(np.arange(num_rows), num_all, seed=0, epoch=0) if num_rows else np.zeros(0, np.int64)
    places = sorted({0, *picks.tolist()}) if num_rows else []
    return places if held is None else [int(row) for row in held[places]]
