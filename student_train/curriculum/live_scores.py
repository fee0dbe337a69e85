"""Scores of rows and documents by the student of one step of the run: what a plan holds of them, and their file.

They are kept as sums over the trained positions of each document, so that every figure of documents and rows follows
from them (config/weights.py, config/rescoring.py), and so that a checkpoint that holds them stays small.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.common.errors import UserError
from potstill.student_train.config.weights import DOCUMENT_COLUMNS, PROBABILITY

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
SUMS = ("loss", "rank", "entropy")  # of loss and entropy in nats, and number of labels that are the most probable token


@dataclass(frozen=True, eq=False)
class LiveRow:
    """Figures of one row of d documents: count int32 [d] of trained positions, sums float32 [d] over these by name of

    SUMS; more: further figures float32 [d] by name, NaN where there is none; stats: statistics of the row.
    """

    row: int
    count: NDArray[np.int32]
    sums: Mapping[str, Float32]
    more: Mapping[str, Float32]
    stats: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class LiveScores:
    """Figures of R rows with D documents in all, by the student before `step`.

    rows int64 [R]: ids over all sources, ascending. num_documents int32 [R], at least 1 each. count, sums and more are
    those of LiveRow, [D], row after row.
    """

    name: str
    step: int
    rows: NDArray[np.int64]
    num_documents: NDArray[np.int32]
    count: NDArray[np.int32]
    sums: Mapping[str, Float32]
    more: Mapping[str, Float32]

    @cached_property
    def bounds(self) -> NDArray[np.int64]:
        """Number of the first document of each row, and of all documents, [R + 1]."""
        return np.concatenate([[0], np.cumsum(self.num_documents, dtype=np.int64)])

    @cached_property
    def documents(self) -> dict[str, Float64]:
        """Every figure of documents [D] by its name (DOCUMENT_COLUMNS), NaN where there is none."""
        known = self.count > 0
        found = {name: values.astype(np.float64) for name, values in self.more.items()}
        for name, column in DOCUMENT_COLUMNS.items():
            if column.of is not None:
                found[name] = np.full(len(known), np.nan)
                total = self.sums[column.of][known].astype(np.float64)
                found[name][known] = column.fold(total, self.count[known].astype(np.float64))
        return found

    @cached_property
    def statistics(self) -> dict[str, Float32]:
        """Statistics of rows [R] by name: means over the trained positions, and over the documents; 0 without any."""

        def per_row(values: NDArray[np.generic]) -> Float64:
            return np.add.reduceat(values.astype(np.float64), self.bounds[:-1]) if len(self.rows) else np.zeros(0)

        def mean(total: Float64, count: Float64) -> Float32:
            return np.divide(total, count, out=np.zeros_like(total), where=count > 0).astype(np.float32)

        count = per_row(self.count)
        sums = {name: per_row(values) for name, values in self.sums.items()}
        found = {
            "mean_loss": mean(sums["loss"], count),
            "mean_entropy": mean(sums["entropy"], count),
            "accuracy": mean(sums["rank"], count),
            "num_targets": count.astype(np.float32),
        }
        for name in ("exact", "answer_probability", *self.more):
            values = self.documents[name]
            is_known = ~np.isnan(values)
            found[f"mean_{name}"] = mean(per_row(np.where(is_known, values, 0.0)), per_row(is_known))
        return found

    def values(self, of: str, column: str) -> Float64:
        """What rows or documents (`of`) are weighed by, of those of which something is known."""
        if of == "document":
            found = self.documents[column][self.count > 0]
            return found[~np.isnan(found)]
        known = self.statistics["num_targets"] > 0
        if column == PROBABILITY:
            return np.exp(-self.statistics["mean_loss"][known].astype(np.float64))
        return self.statistics[column][known].astype(np.float64)

    def of_rows(self, rows: Sequence[int] | NDArray[np.int64]) -> list[LiveRow]:
        """The figures of these rows. Raises UserError for one that was not scored."""
        ids = np.asarray(rows, np.int64)
        places = np.minimum(np.searchsorted(self.rows, ids), max(len(self.rows) - 1, 0))
        missing = ids if not len(self.rows) else ids[self.rows[places] != ids]
        if len(missing):
            raise UserError(
                f"row {missing[0]} has no scores of {self.name!r}: before step {self.step} {len(self.rows)} rows were "
                "scored, with rescoring.rows upcoming those of the steps behind it; set rescoring.rows: all for others"
            )
        return [self._row(int(place)) for place in places]

    def _row(self, place: int) -> LiveRow:
        here = slice(int(self.bounds[place]), int(self.bounds[place + 1]))
        return LiveRow(
            row=int(self.rows[place]),
            count=self.count[here],
            sums={name: values[here] for name, values in self.sums.items()},
            more={name: values[here] for name, values in self.more.items()},
            stats={name: float(values[place]) for name, values in self.statistics.items()},
        )

    def statistics_of(self, first_row: int, num_rows: int) -> dict[str, Float32]:
        """Statistics of the rows [first_row, first_row + num_rows); 0, num_targets too, of one that was not scored."""
        low, high = np.searchsorted(self.rows, [first_row, first_row + num_rows])
        found = {}
        for name, values in self.statistics.items():
            found[name] = np.zeros(num_rows, np.float32)
            found[name][self.rows[low:high] - first_row] = values[low:high]
        return found

    def write(self, path: Path) -> str:
        """Write them into one file of NumPy arrays (npz). Returns its sha256; OSError where the disk takes no more."""
        arrays: dict[str, Any] = {name: getattr(self, name) for name in ("rows", "num_documents", "count")}
        arrays |= {f"sum_{name}": values for name, values in self.sums.items()}
        arrays |= {f"more_{name}": values for name, values in self.more.items()}
        with open(path, "wb") as file:
            np.savez(file, **arrays)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    @classmethod
    def read(cls, path: Path, *, name: str, step: int, sha256: str) -> LiveScores:
        """Read what `write` wrote. Raises UserError where the file is missing or not the one of that digest."""
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}; take another checkpoint") from error
        if found != sha256:
            raise UserError(
                f"{path} has the digest {found[:16]}, the manifest says {sha256[:16]}; the checkpoint is damaged, take "
                "another one"
            )
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)

        def group(prefix: str) -> dict[str, Float32]:
            return {key.removeprefix(prefix): values for key, values in arrays.items() if key.startswith(prefix)}

        plain = {key: arrays[key] for key in ("rows", "num_documents", "count")}
        return cls(name=name, step=step, **plain, sums=group("sum_"), more=group("more_"))
