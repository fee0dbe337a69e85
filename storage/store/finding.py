"""Finding: one thing that is wrong with a store, for a person (`text`) and for a program (the other fields)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

# What is wrong, by kind; docs/format.md lists them, because programs read them from `potstill verify --json`.
KINDS = {
    "missing": "the file is not there",
    "size": "the file is shorter or longer than its record or the manifest says",
    "bytes": "the content does not fit its checksum",
    "record": "no readable commit record, or one of another attempt than the manifest names",
    "layout": "the checksums fit, but the parts of the file are not those of the record, the manifest or the run",
    "rows": "the bytes are whole, but rows break a rule of their content",
    "unreadable": "the system does not let the file be read, so nothing is known of its content",
    "signature": "no signature, or one that does not hold",
}
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
