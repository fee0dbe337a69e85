"""Checks before the first step: does a student fit a store, and do targets sit at the right positions?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from potstill.storage.errors import MismatchError, StoreError
from potstill.storage.loading.order import permute
from potstill.storage.rows.row_types import TargetsRow, TokensRow
from potstill.storage.store.held_rows import held_rows
from potstill.storage.store.reader import StoreReader

# Label and entry are rounded on the same grid from the same number, so they agree to one grid step.
TOLERANCE_NATS = 1 / 16 + 1e-3
MIN_FRACTION = 0.99


@dataclass(frozen=True)
class AlignmentReport:
    """How many labels were found among the kept entries, and how many agreed with the label column."""

    num_rows: int
    num_labels: int
    num_kept: int
    num_agreeing: int


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
    """Recompute label log-probabilities from the entries in row 0 and some others; catches a shift by one token.

    Where the label tokens[t+1] is among the entries of targets[t], its log-probability must equal the stored label
    column; where that column says more than the least entry kept, the label must be among them. Raises MismatchError
    below 99% agreement, and as `check_places` does; needs stores with a label column and log-probabilities.
    """
    rows = _some_rows(targets, num_rows)
    totals = np.zeros(4, np.int64)
    for found_tokens, found_targets in zip(tokens.tokens_rows(rows), targets.targets_rows(rows), strict=True):
        _check_places(found_tokens, found_targets, targets.url)
        totals += _row_agreement(found_tokens, found_targets, targets.url)
    labels, kept, agreeing, absent = (int(x) for x in totals)
    if agreeing < MIN_FRACTION * (kept + absent):
        raise MismatchError(
            f"{targets.url}: of {labels} labels {kept} are among the entries and {agreeing} of these agree with the "
            f"label column, {absent} should be there and are not; the targets are shifted or belong to other tokens"
        )
    return AlignmentReport(len(rows), labels, kept, agreeing)


def check_places(tokens: StoreReader, targets: StoreReader, *, num_rows: int = 16) -> None:
    """See in row 0 and some others that no target stands at a position without one (`TokensRow.has_target`).

    That is where the next token is not trained on, by the mask of the row, or is of another document. For targets of
    every kind. Raises MismatchError that names row and position.
    """
    rows = _some_rows(targets, num_rows)
    for found_tokens, found_targets in zip(tokens.tokens_rows(rows), targets.targets_rows(rows), strict=True):
        _check_places(found_tokens, found_targets, targets.url)


def _some_rows(targets: StoreReader, num_rows: int) -> list[int]:
    """Row 0 and at most `num_rows` others, in order; of a store of some rows only, of those that it holds."""
    held = held_rows(targets)
    num_all = targets.num_rows if held is None else len(held)
    num_rows = min(num_rows + 1, num_all)
    picks = permute(np.arange(num_rows), num_all, seed=0, epoch=0) if num_rows else np.zeros(0, np.int64)
    places = sorted({0, *picks.tolist()}) if num_rows else []
    return places if held is None else [int(row) for row in held[places]]


def _check_places(tokens: TokensRow, row: TargetsRow, where: str) -> None:
    counts, places = np.diff(row.targets.offsets), tokens.has_target()
    if len(counts) != len(places):
        raise MismatchError(f"{where}: row {row.row} has {len(counts)} positions, the tokens store {len(places)}")
    wrong = np.flatnonzero((counts > 0) & ~places)
    if not wrong.size:
        return
    at = int(wrong[0])
    is_masked = at + 1 not in np.cumsum(tokens.doc_lens)
    reason = f"token {at + 1} is not trained on (its mask is off)" if is_masked else f"token {at} ends its document"
    raise MismatchError(
        f"{where}: row {row.row}, position {at} holds a target of {counts[at]} entries, expected none: {reason}. "
        f"{wrong.size} positions of the row are so; make the targets again from this tokens store"
    )


def _row_agreement(tokens: TokensRow, row: TargetsRow, where: str) -> tuple[int, int, int, int]:
    """Labels, those among the entries, those of them that agree, and those that should be there and are not."""
    targets = row.targets
    if targets.label_logprob is None or targets.logprobs is None:
        raise StoreError(f"{where}: row {row.row} has no label column or no log-probabilities to check against")
    labels = tokens.labels()
    counts = np.diff(targets.offsets)
    of_entry = np.repeat(np.arange(targets.num_tokens), counts)
    hits = targets.ids == labels[of_entry]
    close = np.abs(targets.logprobs[hits] - targets.label_logprob[of_entry[hits]]) <= TOLERANCE_NATS
    has_label = (labels >= 0) & (counts > 0)
    least = np.zeros(targets.num_tokens, np.float32)
    least[counts > 0] = targets.logprobs[targets.offsets[1:][counts > 0] - 1]  # entries go down
    expected = has_label & (targets.label_logprob > least + TOLERANCE_NATS)
    expected[of_entry[hits]] = False
    return int(has_label.sum()), int(hits.sum()), int(close.sum()), int(expected.sum())
