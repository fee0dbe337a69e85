"""Rows that a dump leaves out, because a run does not read them: they keep their places in the store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from potstill.storage import COLUMNS, RunSpec, SparseTargets, TargetsRow, TokensRow, token_digest

if TYPE_CHECKING:
    from potstill.teacher_dump.config import DumpConfig

# Ids of the rows to dump, from the settings of one dump (of one checkpoint of a series), int64 [n].
RowsOf = Callable[["DumpConfig"], NDArray[np.int64]]


@dataclass(frozen=True)
class LeftOut:
    """Which rows a walk passes over, and what it stores in their place. wanted bool [num_rows]: rows to run."""

    wanted: NDArray[np.bool_]
    spec: RunSpec

    def count(self, rows: range) -> int:
        """How many of these rows are to be run."""
        return int(self.wanted[rows.start : rows.stop].sum())

    def row(self, row: TokensRow) -> TargetsRow:
        """The place of a row that is left out: no targets, all statistics 0."""
        num_tokens = len(row.tokens)
        columns = {
            name: {at: column.blank(num_tokens) for at in self.spec.temperatures}
            if column.per_temperature
            else column.blank(num_tokens)
            for name, column in COLUMNS.items()
            if column.is_stored(self.spec)
        }
        offsets = np.zeros(num_tokens + 1, np.int64)
        targets = SparseTargets(offsets=offsets, columns=columns, num_draws=self.spec.num_draws)
        stats = dict.fromkeys(self.spec.stats, 0.0)
        return TargetsRow(row.row, token_digest(row.tokens, row.doc_lens), targets, stats)
