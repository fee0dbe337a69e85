"""From a foreign record to rows of stores: its tokens with the bounds of their documents, its entries as targets.

Legend: n tokens of a row, P positions that the file stores, E entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from potstill.storage import SparseTargets, StoreError, TargetsRow, TokensRow, token_digest
from potstill.storage.rows.array_types import STRICT_MASS_EPS
from potstill.teacher_dump.importing.foreign_records import Entries, ForeignRecord, ValueKind
from potstill.teacher_dump.records.base import BadRecord

Normaliser = Literal["vocabulary", "kept"]
# Statistics of each row; the kept mass is not known of values that are relative to the kept entries.
STATS: dict[str, tuple[str, ...]] = {
    "vocabulary": ("accuracy", "kept_mass", "num_targets"),
    "kept": ("accuracy", "num_targets"),
}
# Entries of ids beyond the vocabulary are those of a padded head; more mass than this is another tokenizer.
MAX_BEYOND_MASS = 1e-3
# A renormalised distribution, rounded to bfloat16, is this near to 1 (nats).
KEPT_TOLERANCE = 0.02
_ROUNDING = 0.05  # nats of bfloat16 near 10, and what they do to the tail
_NO_RISE = 1e-5  # nats that rounding to float32 makes


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How values are read: what they are, what they are relative to, entries kept, size of the vocabulary."""

    kind: ValueKind
    normaliser: Normaliser
    k: int
    vocab_size: int


@dataclass
class Figures:
    """Sums over positions with a target, and one maximum; what the commit records keep of each unit."""

    positions: int = 0
    entries: int = 0
    labels_kept: int = 0  # positions whose label is among the entries
    kept_mass: float = 0.0
    rescaled: int = 0  # positions whose probabilities summed to more than a store takes
    rescaled_nats: float = 0.0
    rescaled_nats_max: float = 0.0
    reordered: int = 0  # positions whose values did not fall
    rise_nats: float = 0.0  # of these, how far a value stood above one before it, at most in each position
    rise_nats_max: float = 0.0
    below_rest: int = 0  # positions whose least entry is below the mean of the ids left out: no top-k has that
    beyond_vocabulary: int = 0  # entries of ids that the tokenizer does not have
    cut: int = 0  # entries above k
    without_targets: int = 0  # rows, because their record is broken

    def add(self, other: Figures) -> None:
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            largest = field.name.endswith("_max")
            setattr(self, field.name, max(mine, theirs) if largest else mine + theirs)

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Figures:
        return cls(**value)


def tokens_row(record: ForeignRecord, number: int, *, vocab_size: int, row_length: int) -> tuple[TokensRow, np.ndarray]:
    """The row of a record, and which of its n tokens are in it: bool [n], without padding (segment 0).

    Raises BadRecord: no token, ids outside of the vocabulary, more tokens than a row holds.
    """
    assert record.tokens is not None
    segments = record.segments if record.segments is not None else np.ones(len(record.tokens), np.int64)
    used = segments != 0
    tokens = record.tokens[used]
    if not len(tokens):
        raise BadRecord("it holds no tokens")
    if len(tokens) > row_length:
        raise BadRecord(f"it holds {len(tokens)} tokens, rows have {row_length}; raise row_length")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise BadRecord(f"its ids reach from {low} to {high}, the tokenizer has {vocab_size} entries")
    # A document ends where the number changes, and where padding stood between.
    places = np.flatnonzero(used)
    begins = np.flatnonzero(np.append(True, (np.diff(segments[used]) != 0) | (np.diff(places) != 1)))
    doc_lens = np.diff(np.append(begins, len(tokens))).astype(np.int32)
    return TokensRow(number, tokens.astype(np.int32), doc_lens), used


def targets_row(
    row: TokensRow, entries: Entries, used: np.ndarray | None, reading: Reading
) -> tuple[TargetsRow, Figures]:
    """The targets of `row` where it has any, from the entries of its record; `used` bool: its tokens in the record.

    Raises BadRecord: positions that do not fit the tokens, values or ids that no distribution has.
    """
    num_recorded = len(row.tokens) if used is None else len(used)
    if entries.num_positions not in (num_recorded, num_recorded - 1):
        raise BadRecord(f"it has {entries.num_positions} positions for {num_recorded} tokens")
    wanted = row.has_target()
    # The last token of a record may have no position; it never has a target.
    positions = np.flatnonzero(np.ones(num_recorded, bool) if used is None else used)[wanted]
    figures = Figures(positions=len(positions))
    token_of, ids, values = _taken(entries, positions, reading, figures)
    token_of, ids, values = _best(token_of, ids, values, reading.k, figures)
    counts = np.bincount(token_of, minlength=len(positions))
    if len(counts) and not counts.min():
        raise BadRecord(f"position {positions[int(counts.argmin())]} has no entry")
    logprobs, log_tail = _probabilities(token_of, values, len(positions), reading, figures)
    labels = row.labels()[wanted]
    hits = ids == labels[token_of]
    figures.entries, figures.labels_kept = len(ids), int(hits.sum())
    if reading.normaliser == "vocabulary":
        figures.kept_mass = float(-np.expm1(log_tail).sum())
    part = SparseTargets(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        ids=ids.astype(np.int32),
        logprobs=logprobs.astype(np.float32),
        log_tail=log_tail.astype(np.float32),
    )
    whole = part.spread(wanted)
    try:
        checked = SparseTargets.build(
            offsets=whole.offsets,
            vocab_size=reading.vocab_size,
            strict=True,
            ids=whole.ids,
            logprobs=whole.logprobs,
            log_tail=whole.log_tail,
        )
    except StoreError as error:
        raise BadRecord(str(error)) from error
    first = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64) if len(counts) else np.zeros(0, np.int64)
    num = max(1, len(positions))
    known = {
        "accuracy": float(hits[first].sum()) / num,
        "kept_mass": figures.kept_mass / num,
        "num_targets": float(len(positions)),
    }
    stats = {name: known[name] for name in STATS[reading.normaliser]}
    return TargetsRow(row.row, token_digest(row.tokens, row.doc_lens), checked, stats), figures


def row_without_targets(row: TokensRow, reading: Reading) -> TargetsRow:
    """What a store holds of a row whose record is broken."""
    targets = SparseTargets(
        offsets=np.zeros(len(row.tokens) + 1, np.int64),
        ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        log_tail=np.zeros(len(row.tokens), np.float32),
    )
    return TargetsRow(
        row.row, token_digest(row.tokens, row.doc_lens), targets, dict.fromkeys(STATS[reading.normaliser], 0.0)
    )


def raw_logprobs(entries: Entries, kind: ValueKind) -> np.ndarray:
    """Values [E] as log-probabilities, or as logits where nothing says their sum over the vocabulary."""
    if kind == "probabilities":
        if (entries.values < 0).any():
            raise BadRecord(f"a probability is {entries.values.min()}")
        with np.errstate(divide="ignore"):
            return np.log(entries.values)
    if kind == "logits" and entries.log_normaliser is not None:
        return entries.values - np.repeat(entries.log_normaliser, np.diff(entries.offsets))
    return entries.values


def _taken(
    entries: Entries, positions: np.ndarray, reading: Reading, figures: Figures
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries of the positions [M] that have a target: number of the position [E], id, value. -inf is no entry."""
    counts = np.diff(entries.offsets)[positions]
    token_of = np.repeat(np.arange(len(positions)), counts)
    starts = entries.offsets[:-1][positions] - np.concatenate([[0], np.cumsum(counts)[:-1]]) if len(counts) else counts
    place = np.arange(int(counts.sum())) + np.repeat(starts, counts).astype(np.int64)
    ids, values = entries.ids[place], raw_logprobs(entries, reading.kind)[place]
    there = values != -np.inf
    if not np.isfinite(values[there]).all():
        where = positions[token_of[there][~np.isfinite(values[there])][0]]
        raise BadRecord(f"position {where} holds a value that is no finite number")
    token_of, ids, values = token_of[there], ids[there], values[there]
    if len(ids) and int(ids.min()) < 0:
        raise BadRecord(f"an entry has the id {ids.min()}")
    beyond = ids >= reading.vocab_size
    if beyond.any():
        log_mass = (
            values
            if reading.normaliser == "vocabulary"
            else values - log_sums(token_of, values, len(positions))[token_of]
        )
        mass = np.bincount(token_of[beyond], np.exp(log_mass[beyond]), len(positions))
        if mass.max() > MAX_BEYOND_MASS:
            raise BadRecord(
                f"an entry has the id {ids[beyond][0]}, the tokenizer has {reading.vocab_size} entries: the targets "
                "are of another tokenizer"
            )
        figures.beyond_vocabulary = int(beyond.sum())
        token_of, ids, values = token_of[~beyond], ids[~beyond], values[~beyond]
    return token_of, ids, values


def _best(
    token_of: np.ndarray, ids: np.ndarray, values: np.ndarray, k: int, figures: Figures
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At most `k` entries of each position, by falling value and then by id."""
    # On the precision of the store: values that are equal there are put in order of their ids.
    keys = values.astype(np.float32)
    step = np.diff(keys)
    within = np.diff(token_of) == 0
    if ((step > 0) & within).any():
        _count_rises(token_of, values, figures)
    wrong = within & ((step > 0) | ((step == 0) & (np.diff(ids) < 0)))
    if wrong.any():
        # Few positions are out of order in most files, and sorting all of them would take longest of all.
        touched = np.zeros(int(token_of[-1]) + 1, bool)
        touched[token_of[1:][wrong]] = True
        place = np.flatnonzero(touched[token_of])
        order = place[np.lexsort((ids[place], -keys[place], token_of[place]))]
        ids[place], values[place] = ids[order], values[order]
    counts = np.bincount(token_of) if len(token_of) else np.zeros(0, np.int64)
    if len(counts) and counts.max() > k:
        rank = np.arange(len(token_of)) - np.repeat(np.cumsum(counts) - counts, counts)
        kept = rank < k
        figures.cut = int((~kept).sum())
        token_of, ids, values = token_of[kept], ids[kept], values[kept]
    return token_of, ids, values


def _count_rises(token_of: np.ndarray, values: np.ndarray, figures: Figures) -> None:
    """How far values stand above one before them, of the same position: half of it is wrong with one of the two."""
    # Each position lies below the one before it, so that the least value so far begins anew with it.
    step = float(values.max() - values.min()) + 1.0
    lowered = values - token_of * step
    rises = lowered - np.minimum.accumulate(lowered)
    largest = np.zeros(int(token_of[-1]) + 1)
    np.maximum.at(largest, token_of, rises)
    largest = np.where(largest > _NO_RISE, largest, 0.0)
    figures.reordered = int((largest > 0).sum())
    figures.rise_nats, figures.rise_nats_max = float(largest.sum()), float(largest.max())


def _probabilities(
    token_of: np.ndarray, values: np.ndarray, num: int, reading: Reading, figures: Figures
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [E] that a store takes, and log_tail [M]."""
    sums = log_sums(token_of, values, num)
    if reading.normaliser == "kept":
        if reading.kind != "logits" and not figures.cut and len(sums) and np.abs(sums).max() > KEPT_TOLERANCE:
            worst = float(np.exp(sums[np.abs(sums).argmax()]))
            raise BadRecord(
                f"a position sums to {worst:.4f}, expected 1 of values that are relative to the kept entries; where "
                "they are relative to the vocabulary after all, set normaliser=vocabulary"
            )
        return np.minimum(values - sums[token_of], 0.0), np.full(num, -np.inf)
    above = sums > np.log1p(STRICT_MASS_EPS)
    shift = np.where(above, sums, 0.0)
    figures.rescaled, figures.rescaled_nats = int(above.sum()), float(shift.sum())
    figures.rescaled_nats_max = float(shift.max(initial=0.0))
    # What rounding leaves above 1 in all is within what a store takes, and its tail is empty.
    rest = -np.expm1(np.minimum(np.where(above, 0.0, sums), 0.0))
    with np.errstate(divide="ignore"):
        log_tail = np.log(rest)
        least = np.full(num, np.inf)
        np.minimum.at(least, token_of, values)
        left_out = reading.vocab_size - np.bincount(token_of, minlength=num)
        mean = log_tail - np.log(np.maximum(left_out, 1))
        figures.below_rest = int(((least < mean - _ROUNDING) & (left_out > 0)).sum())
    return np.minimum(values - shift[token_of], 0.0), log_tail


def log_sums(token_of: np.ndarray, values: np.ndarray, num: int) -> np.ndarray:
    """Logarithm of the sum of exp(values) [E] over the entries of each of `num` positions."""
    top = np.full(num, -np.inf)
    np.maximum.at(top, token_of, values)
    with np.errstate(divide="ignore", invalid="ignore"):
        sums: np.ndarray = top + np.log(np.bincount(token_of, np.exp(values - top[token_of]), num))
    return sums
