"""Targets of some rows only: what a run that reads few rows of a teacher needs, and what must not be taken for more.

Such a store has every row of its tokens store by number, so that rows keep their places; a row that it does not hold
stands there without targets, with the statistic HELD 0. The run names which rows it was made for, and a feature, so
that no reader takes a row that was left out for one of which the teacher says nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from potstill.storage.errors import StoreError

ONLY_ROWS = "only_rows"  # the field of run.json and the feature
HELD = "held"  # the statistic: 1 where the row is held, 0 where it was left out
_DIGEST = re.compile(r"[0-9a-f]{64}")


def held_mask(rows: ArrayLike, num_rows: int) -> NDArray[np.bool_]:
    """Whether each row is among `rows`, [num_rows] bool. Raises StoreError for none, and for one beyond the store."""
    found = np.asarray(rows, np.int64)
    if not found.size or found.min() < 0 or found.max() >= num_rows:
        raise StoreError(f"{ONLY_ROWS}: {found.size} rows of a store of {num_rows} were named; expected some of these")
    mask = np.zeros(num_rows, np.bool_)
    mask[found] = True
    return mask


def only_rows_field(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """What run.json says of the rows that a store is made for: their number, and sha256 of their ids as i64."""
    ids = np.flatnonzero(mask).astype("<i8")
    return {"count": len(ids), "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}


def check_only_rows(field: Mapping[str, Any] | None, *, kind: str, stats: Sequence[str]) -> None:
    """The rules of the field in a run. Raises StoreError."""
    if field is None:
        return
    if kind != "targets":
        raise StoreError(f"run spec: {ONLY_ROWS} belongs to kind targets, found {kind}")
    count, digest = field.get("count"), field.get("sha256")
    if set(field) != {"count", "sha256"} or type(count) is not int or count < 1 or not _is_digest(digest):
        raise StoreError(f"run spec: {ONLY_ROWS} is {dict(field)}, expected a count from 1 on and a sha256")
    if HELD not in stats:
        raise StoreError(f"run spec: {ONLY_ROWS} needs the statistic {HELD!r}, found {list(stats)}")


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def check_held_row(stats: Mapping[str, float], num_entries: int) -> None:
    """A row says whether it is held, and one that was left out has no entries. Raises StoreError."""
    if stats[HELD] not in (0.0, 1.0):
        raise StoreError(f"statistic {HELD} is {stats[HELD]}; expected 1, or 0 for a row that was left out")
    if not stats[HELD] and num_entries:
        raise StoreError(f"the row was left out ({HELD} 0) and has {num_entries} entries; expected none")
