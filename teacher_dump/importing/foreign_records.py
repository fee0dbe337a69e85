"""What a reader of foreign targets gives: one record for each sequence, its tokens and the entries of its positions.

Legend: n tokens of a sequence, P positions that the file stores (n, or n - 1), E entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.records.base import BadRecord

ValueKind = Literal["logprobs", "logits", "probabilities"]


@dataclass(frozen=True, eq=False)
class Entries:
    """Position t owns the entries offsets[t] .. offsets[t+1] (int64 [P+1]) and is the distribution after tokens 0..t.

    ids int64 [E], values float64 [E] as the file has them; -inf: no entry. log_normaliser float64 [P]: logarithm of the
    sum over the vocabulary that raw logits are to be divided by, where the file has it.
    """

    offsets: np.ndarray
    ids: np.ndarray
    values: np.ndarray
    log_normaliser: np.ndarray | None = None

    @property
    def num_positions(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of_table(cls, ids: np.ndarray, values: np.ndarray) -> Entries:
        """From tables [P, k]."""
        positions, width = ids.shape
        offsets = np.arange(positions + 1, dtype=np.int64) * width
        return cls(offsets, ids.reshape(-1).astype(np.int64, copy=False), values.reshape(-1).astype(np.float64))


@dataclass(frozen=True, eq=False)
class ForeignRecord:
    """A sequence: tokens int64 [n] and, where the file has it, segments int64 [n] (number of the document, 0: padding).

    `tokens` is None in formats without any; `entries` is None where they were not asked for, and says why where they
    cannot be used.
    """

    tokens: np.ndarray | None
    segments: np.ndarray | None = None
    entries: Entries | BadRecord | None = None


@dataclass(frozen=True)
class FoundRecord:
    """The record at `place`, or why it has no row; `next_place` is where reading begins again after it."""

    place: Place
    next_place: Place
    where: str  # file and record, for a person
    record: ForeignRecord | BadRecord


# What is lost where a file does not number the documents of a record.
NO_BOUNDS = "where documents end inside a record: it is one document, or has the bounds of the tokens store"


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """What is known of foreign files before the first record is decoded.

    `settings` are those that the writer left beside its files; `selection` is that of run.json, before a smaller k;
    `lost` says in words what the files do not hold any more; `num_records` is None where only a pass could tell.
    """

    format: str
    num_files: int
    num_bytes: int
    digest: str
    values: ValueKind
    selection: Mapping[str, Any]
    num_records: int | None
    has_tokens: bool
    has_normaliser: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    lost: tuple[str, ...] = ()


class TargetsSource(Protocol):
    """Foreign files of targets, read in one order only, from any place on."""

    @property
    def facts(self) -> SourceFacts: ...

    def read(self, start: Place, *, entries: bool) -> Iterator[FoundRecord]:
        """Every record from `start` on; without `entries` only what its tokens need is read."""
