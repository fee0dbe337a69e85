"""What every packing rule has: rows out of documents, and a cursor after each row at which a later run continues."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from potstill.storage import TokensRow
from potstill.teacher_dump.documents import Place

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]

# What packing counts beside documents and tokens; `judged` are what `untrained` were found among.
TRAINED, JUDGED, UNTRAINED = "trained_tokens", "judged", "untrained"
TOO_LONG, LOST_TOKENS = "too_long", "lost_tokens"
WINDOW_ROWS = "window_rows"


@dataclass(frozen=True)
class Cursor:
    """State at a unit's end: go on at `place`, leaving out the first `offset` tokens of the document there."""

    place: Place
    offset: int
    documents: int  # documents begun so far in this store
    tokens: int
    bad_lines: int  # broken records before `place`
    more: Mapping[str, int] = field(default_factory=dict)  # counts of a rule or of masks; absent where there are none

    def to_json(self) -> dict[str, int]:
        return {
            "file": self.place.file,
            "record": self.place.record,
            "offset": self.offset,
            "documents": self.documents,
            "tokens": self.tokens,
            "bad_lines": self.bad_lines,
            **self.more,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Cursor:
        names = ("offset", "documents", "tokens", "bad_lines")
        more = {name: int(found) for name, found in value.items() if name not in ("file", "record", *names)}
        place = Place(int(value["file"]), int(value["record"]))
        return cls(place, **{name: int(value[name]) for name in names}, more=more)


@dataclass(frozen=True)
class PackedRow:
    """A finished row and the cursor right after it."""

    row: TokensRow
    cursor: Cursor


@dataclass(frozen=True, kw_only=True)
class PackerStart:
    """What a packer is made with; `masked`: documents may say which of their tokens are trained on.

    `window` and `too_long` are for rules that keep documents whole (see whole.py); `too_long` for `rows` as well.
    """

    row_length: int
    masked: bool = False
    window: int = 1024
    too_long: str = "cut"
    first_row: int = 0
    start: Cursor | None = None  # of an earlier run
    parts: int = 1  # documents that a record may have: `Place.record` is `parts` times its number, plus the one inside


class Packer(Protocol):
    """Rows out of a stream of documents. `counts` holds the figures named above, as far as the rule has them."""

    what_is_judged: str  # "rows" or "documents": which of them are left out where none of their tokens is trained on

    @property
    def documents(self) -> int:
        """Documents begun so far."""

    @property
    def tokens(self) -> int:
        """Tokens so far, in finished rows and in the one that is being filled."""

    @property
    def counts(self) -> Mapping[str, int]: ...

    def wants(self, place: Place) -> bool:
        """False for documents that earlier rows hold already."""

    def add(self, place: Place, ids: Ids, mask: Mask | None = None, *, bad_lines: int = 0) -> Iterator[PackedRow]:
        """Append the document that stands at `place`: ids int32 [n], mask bool [n] (None: all on).

        Yields the rows that it completes. `bad_lines` broken records were counted before it. An empty document leaves
        no trace.
        """

    def finish(self, end: Place, *, bad_lines: int) -> Iterator[PackedRow]:
        """Yield what is left."""

    def last_cursor(self, end: Place, *, bad_lines: int) -> Cursor | None:
        """The cursor of a finished store, with the counts of all of it; None: that of its last row says the same."""


class CountingPacker:
    """What the rules have in common: documents, tokens and counts, which go on from where an earlier run stood."""

    def __init__(self, made: PackerStart, *, counted: Sequence[str] = ()) -> None:
        """`counted`: figures of the rule; those of masks come by themselves."""
        self._row_length, self._masked = made.row_length, made.masked
        self._next_row = made.first_row
        self._start = made.start
        self._documents = made.start.documents if made.start else 0
        self._tokens = made.start.tokens if made.start else 0
        more = made.start.more if made.start else {}
        names = (*counted, *((TRAINED, JUDGED, UNTRAINED) if made.masked else ()))
        self._counts = {name: more.get(name, 0) for name in names}

    @property
    def documents(self) -> int:
        return self._documents

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def counts(self) -> Mapping[str, int]:
        return self._counts

    def wants(self, place: Place) -> bool:
        return self._start is None or place >= self._start.place

    def _used(self, place: Place) -> int:
        """Tokens of the document at `place` that earlier rows hold."""
        return self._start.offset if self._start is not None and place == self._start.place else 0

    def _cursor(self, place: Place, offset: int, bad_lines: int) -> Cursor:
        return Cursor(place, offset, self._documents, self._tokens, bad_lines, dict(self._counts))

    def _judge(self, num_trained: int) -> bool:
        """Count a row or document by its positions that are trained on; whether it has any."""
        self._counts[JUDGED] += 1
        self._counts[TRAINED] += num_trained
        self._counts[UNTRAINED] += not num_trained
        return num_trained > 0


def joined_row(row: int, parts: list[tuple[Ids, Mask | None]]) -> TokensRow:
    """The row of these spans; its mask is None where none of them has one."""
    mask = None
    if any(mask is not None for _, mask in parts):
        mask = np.concatenate([np.ones(len(ids), np.bool_) if mask is None else mask for ids, mask in parts])
    return TokensRow(
        row=row,
        tokens=np.concatenate([ids for ids, _ in parts]).astype(np.int32, copy=False),
        doc_lens=np.array([len(ids) for ids, _ in parts], dtype=np.int32),
        mask=mask,
    )
