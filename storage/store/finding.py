"""Finding: one thing that is wrong with a store, for a person (`text`) and for a program (the other fields)."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from potstill.storage.errors import ReadFailedError, StoreError

# What is wrong, by kind; docs/format.md lists them, because programs read them from `potstill verify --json`.
KINDS = {
    "missing": "the file is not there",
    "size": "the file is shorter or longer than its record or the manifest says",
    "bytes": "the content does not fit its checksum",
    "record": "no readable commit record, or one of another attempt than the manifest names",
    "layout": "the checksums fit, but the parts of the file are not those of the record, the manifest or the run",
    "rows": "the bytes are whole, but rows break a rule of their content",
    "unreadable": "reading ends in an error of the disk, or what stands there is no file",
    "refused": "no permission, or no answer: nothing is known of the content",
    "signature": "no signature, or one that does not hold",
}
# Errors of the system that speak of the file or the disk, not of who asks or of the way there.
_OF_THE_FILE = {errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EUCLEAN}
PARTS = ("store", "id_map", "manifest", "index", "unit", "signature")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`part` is of PARTS, `kind` of KINDS. `file` lies in the store; `rows`: [first, last] of rows that are lost."""

    part: str
    kind: str
    text: str
    unit: int | None = None
    file: str | None = None
    rows: tuple[tuple[int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields, as plain JSON values."""
        return {**asdict(self), "rows": [list(span) for span in self.rows]}


def kind_of(error: StoreError) -> str:
    """The kind of a finding that an error of reading makes."""
    if not isinstance(error, ReadFailedError):
        return "bytes"
    cause = error.__cause__
    return "unreadable" if isinstance(cause, OSError) and cause.errno in _OF_THE_FILE else "refused"


def spans(rows: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Ascending row numbers as (first, last) of each run of neighbours."""
    found: list[tuple[int, int]] = []
    for row in rows:
        if found and row == found[-1][1] + 1:
            found[-1] = (found[-1][0], row)
        else:
            found.append((row, row))
    return tuple(found)


def told(rows: tuple[tuple[int, int], ...], *, shown: int = 3) -> str:
    """`rows 4..7, 9` in words; of many runs the first few."""
    listed = ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in rows[:shown])
    return listed + (f" and {len(rows) - shown} more runs of rows" if len(rows) > shown else "")
