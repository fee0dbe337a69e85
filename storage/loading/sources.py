"""Several tokens stores under one numbering of rows, each joined by the stores that were made from it.

Rows of the sources stand one after the other: source i holds the global row ids [offsets[i], offsets[i + 1]).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import numpy as np

from potstill.storage.errors import MismatchError, StoreError
from potstill.storage.loading.joining import JoinedRow, check_digests, check_joined, map_digest
from potstill.storage.loading.order import Int64
from potstill.storage.rows.row_types import TokensRow
from potstill.storage.store.reader import StoreReader

Joined = dict[str, list[JoinedRow | None]]
R = TypeVar("R", TokensRow, JoinedRow)
PLAIN_NAME = "tokens"  # of the only source of a run that names none


@dataclass(frozen=True, eq=False)
class Source:
    """A tokens store that rows are drawn from, under a name, and the stores over it by theirs."""

    name: str
    tokens: StoreReader
    joined: Mapping[str, StoreReader]


class SourceRows:
    """Reads rows of several sources by global row id."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """Raises MismatchError that names source and field when stores do not belong together.

        All tokens stores must have one row length, tokenizer and vocabulary; each joined store must have been made from
        the tokens of its source, and a name must be of one kind of store in all sources.
        """
        if not sources:
            raise StoreError("no source of rows was given; name at least one tokens store")
        names = [source.name for source in sources]
        if len(set(names)) < len(names):
            raise StoreError(f"two sources have the same name: {names}")
        for source in sources:
            _check_tokens(source, sources[0])
        _check_kinds(sources)
        self.sources = tuple(sources)
        self.offsets: Int64 = np.cumsum([0, *(source.tokens.num_rows for source in sources)], dtype=np.int64)

    @property
    def has_one(self) -> bool:
        """Whether there is one source only, whose row ids are the global ones."""
        return len(self.sources) == 1

    @property
    def joined_names(self) -> frozenset[str]:
        """Names of the joined stores of any source."""
        return frozenset().union(*(source.joined for source in self.sources))

    def digests(self) -> dict[str, str]:
        """Hexadecimal digests that pin what is read: of `tokens` and each `joined.NAME`, or of each of several sources.

        That of `sources.NAME` is sha256 over its number and the names and digests of its stores, so that a saved state
        stays small. Of `vocabulary` too, where the readers give their rows in the ids of another one.
        """
        found = [_digests(source) for source in self.sources]
        pinned = found[0]
        if not self.has_one:
            pinned = {
                f"sources.{self.sources[number].name}": hashlib.sha256(
                    json.dumps([number, digests], sort_keys=True).encode()
                ).hexdigest()
                for number, digests in enumerate(found)
            }
        vocabulary = self.sources[0].tokens.vocabulary  # one for all stores: the checks have seen to it
        return pinned if vocabulary is None else {**pinned, "vocabulary": vocabulary.digest}

    def source_of(self, rows: Int64) -> Int64:
        """Number of the source of each global row id."""
        return np.searchsorted(self.offsets, rows, side="right").astype(np.int64) - 1

    def split(self, rows: Int64) -> list[tuple[int, Int64, Int64]]:
        """(number of the source, places in `rows`, row ids in that source) of each source that `rows` has rows of."""
        if self.has_one:
            return [(0, np.arange(len(rows)), rows)]
        numbers = self.source_of(rows)
        parts = [(int(number), np.flatnonzero(numbers == number)) for number in np.unique(numbers)]
        return [(number, places, rows[places] - self.offsets[number]) for number, places in parts]

    def read(self, rows: Int64, names: frozenset[str]) -> tuple[list[TokensRow], Joined]:
        """Rows in the given order, and for each of `names` what the joined store of each row's source says.

        `.row` of all is the global id. A source without a store of that name gives None. Raises StoreError.
        """
        if self.has_one:
            return _read(self.sources[0], rows, names)
        tokens: list[TokensRow | None] = [None] * len(rows)
        joined: Joined = {name: [None] * len(rows) for name in sorted(names)}
        for number, places, inner in self.split(rows):
            source, offset = self.sources[number], int(self.offsets[number])
            found, beside = _read(source, inner, names & source.joined.keys())
            for place, row in zip(places, found, strict=True):
                tokens[place] = _renumbered(row, offset)
            for name, values in beside.items():
                for place, value in zip(places, values, strict=True):
                    joined[name][place] = _renumbered(cast("JoinedRow", value), offset)
        return cast("list[TokensRow]", tokens), joined


def as_sources(tokens: StoreReader | Sequence[Source], joined: Mapping[str, StoreReader] | None) -> tuple[Source, ...]:
    """One tokens store and the stores over it as the only source, or sources as they are. Raises StoreError."""
    if not isinstance(tokens, Sequence):
        return (Source(PLAIN_NAME, tokens, dict(joined or {})),)
    if joined is not None:
        raise StoreError("stores to join were given beside sources; each source names its own")
    return tuple(tokens)


def _digests(source: Source) -> dict[str, str]:
    return {"tokens": source.tokens.digest, **{f"joined.{name}": r.digest for name, r in source.joined.items()}}


def _read(source: Source, rows: Int64, names: frozenset[str]) -> tuple[list[TokensRow], Joined]:
    tokens = source.tokens.tokens_rows(rows)
    digests = [row.digest() for row in tokens]
    joined: Joined = {}
    for name in sorted(names):
        found = cast("list[JoinedRow]", source.joined[name].rows(rows))
        check_digests(source.joined[name], found, digests)
        joined[name] = cast("list[JoinedRow | None]", found)
    return tokens, joined


def _renumbered(row: R, offset: int) -> R:
    return replace(row, row=row.row + offset) if offset else row


def _check_tokens(source: Source, first: Source) -> None:
    """Raises MismatchError where the stores of `source` do not fit each other, or its tokens those of `first`."""
    tokens = source.tokens
    if tokens.spec.kind != "tokens":
        raise MismatchError(f"{tokens.url} is a store of kind {tokens.spec.kind}, expected tokens")
    for name, reader in source.joined.items():
        check_joined(name, reader, tokens)
    difference = tokens_difference(tokens, first.tokens)
    if difference is not None:
        field, found, wanted = difference
        raise MismatchError(
            f"source {source.name} ({tokens.url}): {field} is {found!r}, source {first.name} has {wanted!r}; "
            "all sources must be prepared alike"
        )


def tokens_difference(tokens: StoreReader, first: StoreReader) -> tuple[str, object, object] | None:
    """(field, found, expected) of the first field by which two tokens stores cannot be sources of one run, if any."""
    for field in ("row_length", "tokenizer_digest", "vocab_size"):
        found, wanted = getattr(tokens.spec, field), getattr(first.spec, field)
        if found != wanted:
            return field, found, wanted
    found, wanted = map_digest(tokens), map_digest(first)
    return None if found == wanted else ("vocabulary map", found, wanted)


def _check_kinds(sources: Sequence[Source]) -> None:
    seen: dict[str, tuple[str, str]] = {}
    for source in sources:
        for name, reader in source.joined.items():
            kind, where = seen.setdefault(name, (reader.spec.kind, source.name))
            if kind != reader.spec.kind:
                raise MismatchError(
                    f"joined store {name} is of kind {reader.spec.kind} in source {source.name}, of kind {kind} in "
                    f"source {where}; names must be of one kind"
                )
