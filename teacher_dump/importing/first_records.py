"""A look at the first records before anything is written: what their values are, and whether they fit the tokens."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from potstill.common.errors import UserError
from potstill.storage import TokensRow
from potstill.teacher_dump.importing.foreign_records import Entries, SourceFacts, ValueKind
from potstill.teacher_dump.importing.foreign_rows import (
    Figures,
    Normaliser,
    Reading,
    log_sums,
    raw_logprobs,
    targets_row,
)
from potstill.teacher_dump.importing.targets_config import ImportTargetsConfig
from potstill.teacher_dump.records.base import BadRecord

log = logging.getLogger(__name__)

NUM_RECORDS, NUM_POSITIONS = 16, 1 << 15  # whichever comes first
# Each position of values that a writer has renormalised sums to 1 within this, rounding to bfloat16 included.
_ONE = 0.01
_MUCH_ABOVE_ONE = 1.5  # the median sum of log-probabilities is below, whatever a fit has done to some
_LEAST_LABELS = 64  # for a word on whether targets stand at their tokens
# Share of positions; measured: none of a fit that serves, 5 % of one that is off by half a nat.
MUCH_BELOW = 0.01


@dataclass(frozen=True)
class Joined:
    """A row of tokens and the entries of its record; `used`: which tokens of the record are in the row."""

    row: TokensRow
    entries: Entries
    used: np.ndarray | None


@dataclass(frozen=True)
class FirstLook:
    """What the first records say: how to read them, their figures, notes for a person."""

    reading: Reading
    figures: Figures
    notes: tuple[str, ...]


def look_at(
    records: Iterable[Joined], facts: SourceFacts, config: ImportTargetsConfig, *, vocab_size: int
) -> FirstLook:
    """Raises UserError: values that are no log-probabilities, a tail that cannot be had, targets at other tokens."""
    first: list[Joined] = []
    for one in itertools.islice(records, NUM_RECORDS):
        first.append(one)
        if sum(other.entries.num_positions for other in first) >= NUM_POSITIONS:
            break
    kind: ValueKind = facts.values if config.values == "auto" else config.values
    held = int(facts.selection["k"])
    k = min(config.k or held, held, vocab_size)
    normaliser, notes = _normaliser(first, facts, config, kind=kind, full=held >= vocab_size)
    reading = Reading(kind=kind, normaliser=normaliser, k=k, vocab_size=vocab_size)
    figures = Figures()
    agreements: list[np.ndarray] = []
    for one in first:
        try:
            row, found = targets_row(one.row, one.entries, one.used, reading)
        except BadRecord:
            continue  # counted when its turn comes
        figures.add(found)
        agreements.append(_label_mass(one.row, row.targets.offsets, row.targets.ids, row.targets.logprobs))
    notes += _placement(agreements)
    if figures.below_rest > MUCH_BELOW * figures.positions:
        notes.append(
            f"the values are off, as of a fit that failed: at {figures.below_rest} of {figures.positions} positions of "
            "the first records the least entry is below the mean of the ids left out, which no top-k has. What the "
            "writer's own reader would give is stored"
        )
    for note in notes:
        log.warning("%s", note)
    return FirstLook(reading, figures, tuple(notes))


def _normaliser(
    first: Sequence[Joined], facts: SourceFacts, config: ImportTargetsConfig, *, kind: ValueKind, full: bool
) -> tuple[Normaliser, list[str]]:
    """What values are relative to, by the options and by the sums of the first records."""
    if kind == "logits" and not facts.has_normaliser:
        if config.normaliser == "vocabulary":
            raise UserError(
                "normaliser=vocabulary: the values are raw logits without the logarithm of their sum over the "
                "vocabulary, so no probability over the vocabulary can be had from them; name its column as "
                "--normaliser-column, or leave normaliser out, and train with missing_mass renorm or support"
            )
        return "kept", [f"the values are raw logits without their normaliser: {_KEPT_NOTE}"]
    sums = np.concatenate([np.zeros(0), *(_sums(one, kind) for one in first)])
    if not len(sums):
        return "vocabulary" if config.normaliser == "auto" else config.normaliser, []
    if np.median(sums) > _MUCH_ABOVE_ONE:
        raise UserError(
            f"the probabilities of a position sum to {np.median(sums):.4g} in the median of the first records, "
            f"expected 1 at most: these are no {kind} over the vocabulary. Raw logits are read with --values logits"
        )
    near_one = bool((np.abs(sums - 1) <= _ONE).all()) and not full
    if config.normaliser == "kept" and not near_one and not full:
        raise UserError(
            f"normaliser=kept: the probabilities of a position sum to {sums.mean():.4f} on average, expected 1 of "
            "values that their writer renormalised; leave normaliser out, they are relative to the vocabulary"
        )
    if config.normaliser == "vocabulary" and near_one:
        return "vocabulary", ["every position of the first records sums to 1 over its entries, yet is read as asked"]
    if config.normaliser == "kept" or near_one:
        return "kept", [f"every position of the first records sums to 1 over its entries: {_KEPT_NOTE}"]
    return "vocabulary", []


_KEPT_NOTE = (
    "what the teacher gives to all other ids is lost, the store says so (normaliser kept), and stages that read it "
    "must set missing_mass to renorm or support"
)


def _sums(one: Joined, kind: ValueKind) -> np.ndarray:
    """Sum of the probabilities of each position of a record that its row has, [M]."""
    try:
        values = raw_logprobs(one.entries, kind)
    except BadRecord:
        return np.zeros(0)
    num = one.entries.num_positions
    token_of = np.repeat(np.arange(num), np.diff(one.entries.offsets))
    there = np.isfinite(values)
    with np.errstate(over="ignore"):
        sums = np.exp(log_sums(token_of[there], values[there], num))
    in_row = np.ones(num, bool) if one.used is None else one.used[:num]
    found: np.ndarray = sums[in_row & (sums > 0)]
    return found


def _label_mass(row: TokensRow, offsets: np.ndarray, ids: np.ndarray, logprobs: np.ndarray | None) -> np.ndarray:
    """Mean probability [4] that the entries give to the next token, to the token itself, to the one after the next and
    to a token from elsewhere in the row, summed over the positions where all are there; and how many those are, [5]."""
    assert logprobs is not None
    num = len(row.tokens)
    token_of = np.repeat(np.arange(num), np.diff(offsets))
    positions = np.flatnonzero(row.has_target())
    positions = positions[positions + 2 < num]
    found = np.zeros(5)
    found[4] = len(positions)
    inside = np.zeros(num, bool)
    inside[positions] = True
    mass = np.exp(logprobs.astype(np.float64))
    for number, shift in enumerate((1, 0, 2, num // 2)):
        there = np.roll(row.tokens, -shift)[token_of] == ids
        found[number] = mass[there & inside[token_of]].sum()
    return found


def _placement(agreements: Sequence[np.ndarray]) -> list[str]:
    """Refuse targets that say more of other tokens than of the next ones; say what they give to those."""
    total = np.sum(agreements, axis=0) if agreements else np.zeros(5)
    if total[4] < _LEAST_LABELS:
        return []
    of_next, of_itself, of_second, of_other = total[:4] / total[4]
    if of_next <= max(of_itself, of_second, of_other):
        raise UserError(
            f"the first records give {of_next:.4f} to the next token on average, {of_itself:.4f} to the token itself, "
            f"{of_second:.4f} to the one after the next, {of_other:.4f} to one from elsewhere: these targets are "
            "shifted, or of other tokens. Position t must predict token t + 1; row r of the tokens must be "
            "sequence r"
        )
    log.info("the first records give %.4f to the next token on average, %.4f to others at most", of_next, of_other)
    return []
