"""The columns that a scores store may have besides those of its tokens. A new one is one entry of SCORES_COLUMNS.

They hold one number per document of a row, in the order of the row's documents. A run names them in `columns`; each has
a feature, so that a reader without the entry refuses the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from potstill.storage.errors import CorruptError, StoreError
from potstill.storage.rows.array_types import UInt8
from potstill.storage.rows.column import Array, StoreView
from potstill.storage.rows.planes import Plane

_VALUE_BYTES = 4
_SHARES = (0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.999, 1)


@dataclass(frozen=True, kw_only=True)
class ScoresColumn:
    """A column of a scores store: float32 [d], one value per document, NaN for a document that it says nothing of.

    name     key of the array in ScoresRow.more, and name of its plane
    feature  name in required_features of a store that has the column
    low, high: between which values (inclusive) every number lies
    bins     upper bounds of the bins in which `store_stats` counts
    """

    name: str
    feature: str
    low: float
    high: float
    bins: tuple[float, ...]

    @property
    def plane(self) -> Plane:
        """Its plane: little-endian float32."""
        return Plane(self.name, "document", _VALUE_BYTES)

    @property
    def feature_rule(self) -> str:
        """What a reader says where feature and columns of a run contradict each other."""
        return f"{self.name} and the feature {self.feature} come together"

    def is_stored(self, spec: StoreView) -> bool:
        """Whether a store of that run has the column."""
        return spec.kind == "scores" and self.name in spec.columns

    def check(self, values: Array) -> None:
        """Raise StoreError unless every number lies within its bounds."""
        if values.dtype != np.float32 or values.ndim != 1 or not len(values):
            raise StoreError(f"{self.name}: found {values.dtype} of shape {values.shape}, expected float32 [documents]")
        inside = np.isnan(values) | ((values >= self.low) & (values <= self.high))
        if not inside.all():
            place = int(np.flatnonzero(~inside)[0])
            raise StoreError(
                f"{self.name}: document {place} has {values[place]:g}, expected a number in [{self.low:g}, "
                f"{self.high:g}], or NaN where nothing is known"
            )

    def to_bytes(self, values: Array) -> UInt8:
        """The plane of one row; every NaN has the same bits."""
        plain = np.where(np.isnan(values), np.float32(np.nan), values)
        return np.frombuffer(plain.astype("<f4").tobytes(), np.uint8)

    def from_bytes(self, plane: UInt8) -> Array:
        """Inverse of to_bytes. Raises CorruptError for what no writer makes."""
        values: Array = np.frombuffer(plane.tobytes(), "<f4").astype(np.float32)
        try:
            self.check(values)
        except StoreError as error:
            raise CorruptError(f"plane {error}") from None
        return values


_TABLE = (
    # What a rollout found: the share of K sampled answers that passed, and the grade of the greedy one.
    ScoresColumn(name="pass_rate", feature="document_scores", low=0.0, high=1.0, bins=_SHARES),
    ScoresColumn(name="greedy_score", feature="document_scores", low=0.0, high=1.0, bins=_SHARES),
)
SCORES_COLUMNS: dict[str, ScoresColumn] = {column.name: column for column in _TABLE}


def stored_scores_columns(spec: StoreView) -> list[ScoresColumn]:
    """The columns per document of a scores store of that run, in file order."""
    return [column for column in SCORES_COLUMNS.values() if column.is_stored(spec)]


def check_scores_columns(more: Mapping[str, Array], spec: StoreView) -> None:
    """Raise StoreError unless a row has the columns of its store, within their rules and of equally many documents."""
    wanted = {column.name for column in stored_scores_columns(spec)}
    if more.keys() != wanted:
        raise StoreError(f"columns per document are {sorted(more)}, the run names {sorted(wanted)}")
    for name, values in more.items():
        SCORES_COLUMNS[name].check(values)
    sizes = {name: len(values) for name, values in more.items()}
    if len(set(sizes.values())) > 1:
        raise StoreError(f"columns per document are of different numbers of documents: {sizes}")
