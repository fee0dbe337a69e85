"""Stores that belong together, joined by row: the check, and a map-style data set over them (no torch needed)."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsIndex, cast

from potstill.storage.errors import MismatchError
from potstill.storage.rows.row_types import ScoresRow, TargetsRow, TokensRow
from potstill.storage.store.held_rows import check_holds
from potstill.storage.store.reader import StoreReader

JoinedRow = TargetsRow | ScoresRow
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class RowSample:
    """A row of tokens, and what each joined store says about it, by name."""

    tokens: TokensRow
    joined: Mapping[str, JoinedRow]

    def targets(self, name: str) -> TargetsRow:
        """What the targets store `name` says. Raises MismatchError where that is a store of scores."""
        return as_targets(name, self.joined[name])


class RowDataset:
    """`tokens` and the stores made from it as a map-style data set: len(), [i], and batches for torch's DataLoader.

    Row i is at position i; order and sampling are the caller's. Thread-safe, and may be forked into worker processes.
    """

    def __init__(self, tokens: StoreReader, joined: Mapping[str, StoreReader]) -> None:
        """Raises MismatchError, which names the field, when a store was not made from `tokens`."""
        if tokens.spec.kind != "tokens":
            raise MismatchError(f"{tokens.url} is a store of kind {tokens.spec.kind}, expected tokens")
        for name, reader in joined.items():
            check_joined(name, reader, tokens)
        self._tokens, self._joined = tokens, dict(joined)

    def __len__(self) -> int:
        return self._tokens.num_rows

    def __getitem__(self, row: SupportsIndex) -> RowSample:
        """Raises IndexError outside of 0 .. len - 1, so that a plain `for` ends."""
        number = operator.index(row)
        if not 0 <= number < len(self):
            raise IndexError(f"{self._tokens.url}: row {number} does not exist, the store has {len(self)} rows")
        return self.__getitems__([number])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[RowSample]:
        """Several rows at once (torch's DataLoader calls this): rows of one record batch cost one read."""
        tokens = self._tokens.tokens_rows(rows)
        digests = [row.digest() for row in tokens]
        joined = {}
        for name, reader in self._joined.items():
            joined[name] = cast("list[JoinedRow]", reader.rows(rows))
            check_digests(reader, joined[name], digests)
        return [
            RowSample(row, {name: found[number] for name, found in joined.items()}) for number, row in enumerate(tokens)
        ]

    def __iter__(self) -> Iterator[RowSample]:
        """Every row in order; some are read at once."""
        for first in range(0, len(self), _ROWS_AT_ONCE):
            yield from self.__getitems__(range(first, min(first + _ROWS_AT_ONCE, len(self))))


def as_targets(name: str, row: JoinedRow) -> TargetsRow:
    """`row` of the joined store `name`. Raises MismatchError where that is a store of scores."""
    if not isinstance(row, TargetsRow):
        raise MismatchError(f"joined store {name} is of kind scores, expected targets")
    return row


def check_joined(name: str, reader: StoreReader, tokens: StoreReader) -> None:
    """A joined store must have been made from exactly these tokens. Raises MismatchError that names the field."""
    if reader.spec.kind == "tokens":
        raise MismatchError(f"joined store {name} ({reader.url}) is of kind tokens, expected targets or scores")
    difference = first_difference(reader, tokens)
    if difference is not None:
        key, found, wanted = difference
        raise MismatchError(
            f"joined store {name} ({reader.url}): {key} is {found!r}, the tokens store {tokens.url} has {wanted!r}"
        )


def first_difference(reader: StoreReader, tokens: StoreReader) -> tuple[str, object, object] | None:
    """(field, found, expected) of the first field by which `reader` cannot have been made from `tokens`, if any."""
    pairs: dict[str, tuple[object, object]] = {
        "input_digest": (reader.spec.input_digest, tokens.digest),
        "row_length": (reader.spec.row_length, tokens.spec.row_length),
        "num_rows": (reader.num_rows, tokens.num_rows),
        "tokenizer_digest": (reader.spec.tokenizer_digest, tokens.spec.tokenizer_digest),
        "vocab_size": (reader.spec.vocab_size, tokens.spec.vocab_size),
        "vocabulary map": (map_digest(reader), map_digest(tokens)),
    }
    return next(((key, found, wanted) for key, (found, wanted) in pairs.items() if found != wanted), None)


def map_digest(reader: StoreReader) -> str | None:
    """Beginning of the digest of what renames the ids of a reader's rows; None where nothing does."""
    return None if reader.vocabulary is None else reader.vocabulary.digest[:16]


def check_digests(reader: StoreReader, rows: Sequence[JoinedRow], digests: Sequence[int]) -> None:
    """Each row must be held by `reader` and made from the tokens of that digest. Raises MismatchError with the row."""
    check_holds(reader, rows)
    for row, digest in zip(rows, digests, strict=True):
        if row.token_digest != digest:
            raise MismatchError(
                f"{reader.url}: row {row.row} was made from other tokens (digest "
                f"{row.token_digest:#x}, the tokens store has {digest:#x}); make the store again"
            )
