"""What a store of some rows only says to a reader (rows/only_rows.py has the rules)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from potstill.storage.errors import MismatchError
from potstill.storage.rows.only_rows import HELD
from potstill.storage.rows.row_types import Row
from potstill.storage.store.reader import StoreReader


def held_rows(reader: StoreReader) -> NDArray[np.int64] | None:
    """Ids of the rows that a store of some rows only holds, ascending; None of a store of all rows."""
    if reader.spec.only_rows is None:
        return None
    return np.flatnonzero(np.asarray(reader.row_stats[HELD]) > 0)


def check_holds(reader: StoreReader, rows: Sequence[Row]) -> None:
    """See that none of the rows just read was left out of their store. Raises MismatchError that names the first."""
    if reader.spec.only_rows is None:
        return
    for row in rows:
        if not getattr(row, "stats", {}).get(HELD, 1.0):
            raise MismatchError(missing_text(reader, row.row))


def missing_text(reader: StoreReader, row: int) -> str:
    """What an error says of a row that a store was not made for."""
    assert reader.spec.only_rows is not None
    return (
        f"{reader.url}: row {row} was left out of this store, which holds {reader.spec.only_rows['count']} of "
        f"{reader.num_rows} rows: those that a run was planned to read when it was dumped. Dump again into another "
        "folder, with `potstill dump --only-rows-of RUN.yaml` for the run as it is now, or without it for all rows"
    )
