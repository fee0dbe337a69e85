"""VocabularyMap: rows in the ids of another vocabulary, which has more tokens, fewer, or the same in another order.

The stored distribution is one over the teacher's vocabulary. Its kept entries are renamed; entries of ids that the
student lacks are removed, and their probability joins the tail, the one bucket of all that is not listed. The result is
the stored distribution with these ids merged, exactly, so that every divergence on entries and tail stays one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from potstill.storage.errors import MismatchError, StoreError
from potstill.storage.rows.array_types import MAX_VOCAB_SIZE, Float32, Int32, Int64
from potstill.storage.rows.column import Array, Values
from potstill.storage.rows.columns import COLUMNS
from potstill.storage.rows.row_types import Row, TargetsRow, TokensRow
from potstill.storage.rows.sparse_targets import SparseTargets, offsets_of
from potstill.storage.rows.target_checks import segment_sums

DROPPED = -1


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """What each id of a store is called in the student's vocabulary.

    new_id int32 [V_teacher]: the student's id, distinct, or DROPPED (-1) where the student lacks the token; vocab_size:
    number of the student's ids. Rows pass through `map_row`; an identity gives back the row itself.
    """

    new_id: Int32
    vocab_size: int

    @classmethod
    def build(cls, new_id: ArrayLike, *, vocab_size: int) -> VocabularyMap:
        """Checked; raises StoreError that names the first id that is wrong."""
        found = np.asarray(new_id)
        if found.ndim != 1 or not found.size or not np.issubdtype(found.dtype, np.integer):
            raise StoreError(f"vocabulary map: found {found.dtype} {found.shape}, expected one integer per stored id")
        if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
            raise StoreError(f"vocabulary map: vocab_size {vocab_size}, expected 1..{MAX_VOCAB_SIZE}")
        wrong = np.flatnonzero((found < DROPPED) | (found >= vocab_size))
        if wrong.size:
            old = int(wrong[0])
            raise StoreError(
                f"vocabulary map: id {old} becomes {found[old]}, expected -1 (dropped) or 0..{vocab_size - 1}"
            )
        kept = np.sort(found[found >= 0])
        if not kept.size:
            raise StoreError("vocabulary map: every id is dropped; the two vocabularies have nothing in common")
        twice = kept[1:][kept[1:] == kept[:-1]]
        if twice.size:
            old = np.flatnonzero(found == twice[0])[:2].tolist()
            raise StoreError(f"vocabulary map: the ids {old} both become {twice[0]}; two tokens cannot be one")
        return cls(np.ascontiguousarray(found, np.int32), int(vocab_size))

    @cached_property
    def num_dropped(self) -> int:
        """Stored ids that the student lacks."""
        return int((self.new_id < 0).sum())

    @cached_property
    def is_identity(self) -> bool:
        """Whether every stored id keeps its number; the student may have further ones."""
        return bool((self.new_id == np.arange(len(self.new_id))).all())

    @cached_property
    def _keeps_order(self) -> bool:
        kept = self.new_id[self.new_id >= 0]
        return bool((kept[1:] > kept[:-1]).all())

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over the table and the size."""
        head = f"potstill vocabulary map v1 {self.vocab_size} ".encode()
        return hashlib.sha256(head + self.new_id.astype("<i4").tobytes()).hexdigest()

    def map_row(self, row: Row) -> Row:
        """A row of any kind in the student's ids; scores hold no ids. Raises StoreError as the two below."""
        if isinstance(row, TokensRow):
            return self.map_tokens(row)
        if isinstance(row, TargetsRow) and not self.is_identity:
            return replace(row, targets=self.map_targets(row.targets))
        return row

    def map_tokens(self, row: TokensRow) -> TokensRow:
        """The text in the student's ids. StoreError where it holds a dropped id: the student could not read it."""
        if self.is_identity:
            return row
        tokens = self.new_id.take(row.tokens)
        if self.num_dropped and int(tokens.min(initial=0)) < 0:
            wrong = np.flatnonzero(tokens < 0)
            raise StoreError(
                f"row {row.row}, position {wrong[0]}: token id {row.tokens[wrong[0]]} of the text is not in the "
                f"student's vocabulary ({len(wrong)} of the row's {len(tokens)} tokens are not); a student needs every "
                "token that occurs in its text: keep these in its tokenizer, or prepare the text without them"
            )
        return replace(row, tokens=tokens, stored_digest=row.digest())

    def map_ids(self, ids: Sequence[int], *, what: str) -> list[int]:
        """A few ids of the store, e.g. what begins a document, in the student's. Raises StoreError with `what`."""
        found: list[int] = self.new_id[list(ids)].tolist()
        if DROPPED in found:
            raise StoreError(f"{what}: id {ids[found.index(DROPPED)]} is not in the student's vocabulary")
        return found

    def map_targets(self, targets: SparseTargets) -> SparseTargets:
        """Entries renamed, those of dropped ids merged into the tails, at every stored temperature.

        The order of entries stays; entries of one log-probability may be in any order of ids, as a store decodes them.
        Entropy and the label's columns stay the teacher's. A token whose entries are all dropped has no target left.
        Raises MismatchError for draws with dropped ids: the tail of draws is not known.
        """
        if self.is_identity:
            return targets
        ids = self.new_id.take(targets.ids)
        if not self.num_dropped or int(ids.min(initial=0)) >= 0:
            renamed = _with(targets, {"ids": ids})
            return renamed if self._keeps_order or targets.num_draws is None else _ties_by_id(renamed)
        if targets.num_draws is not None:
            raise MismatchError(DRAWS_NEED_ALL)
        return _merged(targets, ids)


DRAWS_NEED_ALL = (
    "a store of draws (selection sample) cannot be read with a vocabulary that drops ids: draws keep no tail that "
    "these could join; use targets of mode top_k or top_p_k, or a student with every token of the teacher"
)


def _merged(targets: SparseTargets, ids: Int32) -> SparseTargets:
    """Targets with new ids [E], without the entries whose id is negative."""
    assert targets.logprobs is not None
    logprobs, counts, num_tokens = targets.logprobs, np.diff(targets.offsets), targets.num_tokens
    lost = np.flatnonzero(ids < 0)
    lost_of = np.searchsorted(targets.offsets, lost, side="right") - 1  # token of each
    left: Int64 = counts - np.bincount(lost_of, minlength=num_tokens)
    touched = np.flatnonzero(left < counts)  # tokens with a dropped entry: only these change
    empty = left[touched] == 0

    def joined(tail: Float32, temperature: float) -> Float32:
        """`tail` [N] with the dropped mass at a temperature."""
        before = tail[touched].astype(np.float64)
        powers = np.exp(logprobs[lost] / np.float32(temperature))
        dropped = np.bincount(lost_of, weights=powers, minlength=num_tokens)[touched].astype(np.float64)
        if temperature != 1.0:
            # p^(1/T) / Z_T: the entries together have what the stored tail at T leaves, so Z_T need not be known.
            total = segment_sums(np.exp(logprobs / np.float32(temperature)), targets.offsets)[touched]
            dropped = dropped / total * -np.expm1(np.minimum(before, 0.0))
        out = tail.copy()
        with np.errstate(divide="ignore"):
            out[touched] = np.where(empty, 0.0, np.minimum(np.logaddexp(before, np.log(dropped)), 0.0))
        return out

    changed: dict[str, Values] = {"ids": ids, "log_tail": joined(targets.log_tail, 1.0)}
    if targets.log_tail_at:
        changed["log_tail_at"] = {t: joined(tail, t) for t, tail in targets.log_tail_at.items()}
    live = np.flatnonzero(ids >= 0)
    return _with(targets, changed).each(
        lambda name, array: array.take(live, axis=0) if COLUMNS[name].axis == "entry" else array,
        offsets=offsets_of(left),
    )


def dropped_mass(targets: SparseTargets, mapping: VocabularyMap) -> NDArray[np.float64]:
    """Probability of the kept entries whose id is dropped, of each token [N]; 0 where nothing is."""
    if targets.logprobs is None:
        return np.zeros(targets.num_tokens)
    mass = np.where(mapping.new_id.take(targets.ids) < 0, np.exp(targets.logprobs.astype(np.float64)), 0.0)
    sums: NDArray[np.float64] = segment_sums(mass, targets.offsets)
    return sums


def _with(targets: SparseTargets, columns: dict[str, Values]) -> SparseTargets:
    return SparseTargets(offsets=targets.offsets, columns={**targets.columns, **columns}, num_draws=targets.num_draws)


def _ties_by_id(targets: SparseTargets) -> SparseTargets:
    """Draws in the order that their format asks for: entries of equal weight by id."""
    values: Array = targets.entry_column[1]
    token = np.repeat(np.arange(targets.num_tokens), np.diff(targets.offsets))
    order: Int64 = np.lexsort((targets.ids, -values.astype(np.float64), token))
    return targets.take_entries(order)
