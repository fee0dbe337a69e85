"""Row plans: which rows make up global batch b. Pure functions of the batch number, equal on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from potstill.storage.errors import StoreError
from potstill.storage.loading.order import ORDER_VERSION, Int64, RowOrder


class RowPlan(Protocol):
    """Rows of global batch 0, 1, 2, ... without end."""

    @property
    def global_batch(self) -> int:
        """Rows in each global batch."""

    def rows(self, batch: int) -> Int64:
        """Row numbers [global_batch] of global batch `batch`."""

    def joined(self, batch: int) -> frozenset[str]:
        """Names of the joined stores that this batch needs."""

    def position(self, batch: int) -> dict[str, int]:
        """Where batch `batch` starts: epoch, stage, rows_consumed."""

    def identity(self) -> dict[str, Any]:
        """JSON that pins everything the rows depend on; compared when a state is loaded."""


class EpochPlan:
    """Every row once per epoch; positions run on through the epochs, so batches are always whole."""

    def __init__(
        self,
        num_rows: int,
        *,
        global_batch: int,
        seed: int,
        mode: str = "global",
        joined: Collection[str] = (),
        rows: ArrayLike | None = None,
    ) -> None:
        """`num_rows` of the tokens store; `joined` names the stores that every batch reads.

        `rows` takes these row numbers only (an epoch is then each of them once). Raises StoreError for a row that does
        not exist or is named twice, and for fewer rows than a global batch.
        """
        self._chosen = None if rows is None else _chosen_rows(rows, num_rows)
        size = num_rows if self._chosen is None else len(self._chosen)
        if global_batch < 1 or size < global_batch:
            raise StoreError(f"plan: {size} rows are fewer than a global batch of {global_batch}; lower the batch")
        self.global_batch = global_batch
        self._num_rows = num_rows
        self._order, self._joined = RowOrder(size, seed=seed, mode=mode), frozenset(joined)

    def rows(self, batch: int) -> Int64:
        if batch < 0:
            raise StoreError(f"plan: batch {batch} is negative")
        positions = np.arange(batch * self.global_batch, (batch + 1) * self.global_batch, dtype=np.int64)
        found = self._order.endless(positions)
        return found if self._chosen is None else self._chosen[found]

    def joined(self, batch: int) -> frozenset[str]:
        return self._joined

    def position(self, batch: int) -> dict[str, int]:
        consumed = batch * self.global_batch
        return {"epoch": consumed // self._order.num_rows, "stage": 0, "rows_consumed": consumed}

    def identity(self) -> dict[str, Any]:
        return {
            "plan": "epochs",
            "order_version": ORDER_VERSION,
            "num_rows": self._num_rows,
            "global_batch": self.global_batch,
            "seed": self._order.seed,
            "mode": self._order.mode,
            "joined": sorted(self._joined),
            **(
                {}
                if self._chosen is None
                else {"rows": hashlib.sha256(self._chosen.astype("<i8").tobytes()).hexdigest()[:24]}
            ),
        }


def _digest(rows: Int64) -> str:
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:24]


def _chosen_rows(rows: ArrayLike, num_rows: int) -> Int64:
    """Row numbers [n], ascending, so that the order does not depend on how they were listed."""
    found = np.asarray(rows)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise StoreError(
            f"plan: rows are {found.dtype} of shape {found.shape}, expected row numbers [n]; "
            "of a mask take np.flatnonzero"
        )
    chosen: Int64 = np.unique(found).astype(np.int64)
    if len(chosen) < len(found):
        raise StoreError(f"plan: {len(found) - len(chosen)} of the {len(found)} rows are named twice; name each once")
    if len(chosen) and not 0 <= chosen[0] <= chosen[-1] < num_rows:
        raise StoreError(f"plan: rows {chosen[0]}..{chosen[-1]} are not in [0, {num_rows})")
    return chosen
