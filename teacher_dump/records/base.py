"""What every kind of record has: the fields that it reads, what the split hashes, and its ids with their mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from potstill.teacher_dump.records.table import RECORD_KINDS

if TYPE_CHECKING:
    from potstill.teacher_dump.config import PrepareConfig
    from potstill.teacher_dump.tokenizer import TextEncoder

IdsAndMask = tuple[NDArray[np.int32], NDArray[np.bool_] | None]


class BadRecord(Exception):
    """A record that cannot be used; counted by the reader, never raised to the user."""


@dataclass(frozen=True)
class Record:
    """One record: what becomes a document.

    text: all of it as text; a tokenizer that is trained on the input sees this.
    key: what the held-out split hashes, so that records with equal keys fall on one side.
    content: what the kind itself encodes.
    """

    text: str
    key: str
    content: Any = None


class RecordKind(Protocol):
    """How the values of a record become a document's tokens."""

    @property
    def fields(self) -> Mapping[str, str]:
        """Key of the configuration -> the field or column that it names."""

    @property
    def masked(self) -> bool:
        """Whether documents say which of their tokens are trained on."""

    @property
    def required(self) -> bool:
        """Whether a record of JSON lines without the fields ends the run, instead of being a broken one."""

    def read(self, values: Mapping[str, Any]) -> Record | BadRecord:
        """The record of these values, which hold all of `fields`; or why it cannot be used."""

    def encode(self, encoder: TextEncoder, records: Sequence[Record]) -> list[IdsAndMask]:
        """ids int32 [n] and mask bool [n] (None: all are trained on) of each record; no ids, no document."""

    def info(self) -> Mapping[str, Any]:
        """What run.json keeps of it."""


def record_kind(config: PrepareConfig) -> RecordKind:
    """The kind of record that the configuration asks for. Raises UserError."""
    kind: RecordKind = import_module(RECORD_KINDS[config.record_key].module).make(config)
    return kind


def as_text(value: Any, field: str) -> str | BadRecord:
    """The value itself if it can be tokenized, else why not."""
    if not isinstance(value, str):
        return BadRecord(f"field {field!r} is {type(value).__name__}, expected a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return BadRecord(f"field {field!r} holds half of a surrogate pair at character {error.start}")
    return value


def missing_field(kind: RecordKind, names: Sequence[str]) -> str | None:
    """Which field of the kind is not among these names, in words; None where all are there."""
    for key, name in kind.fields.items():
        if name not in names:
            return f"no field {name!r}; found {sorted(names)}; set {key} (--{key.replace('_', '-')})"
    return None
