"""Row plans: which rows make up global batch b. Pure functions of the batch number, equal on every rank."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

import numpy as np

from potstill.storage.errors import StoreError
from potstill.storage.order import ORDER_VERSION, Int64, RowOrder


class RowPlan(Protocol):
    """Rows of global batch 0, 1, 2, ... for ever."""

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
        self, num_rows: int, *, global_batch: int, seed: int, mode: str = "global", joined: Collection[str] = ()
    ) -> None:
        if global_batch < 1 or num_rows < global_batch:
            raise StoreError(f"plan: {num_rows} rows are fewer than a global batch of {global_batch}; lower the batch")
        self.global_batch = global_batch
        self._order, self._joined = RowOrder(num_rows, seed=seed, mode=mode), frozenset(joined)

    def rows(self, batch: int) -> Int64:
        if batch < 0:
            raise StoreError(f"plan: batch {batch} is negative")
        n = self._order.num_rows
        positions = np.arange(batch * self.global_batch, (batch + 1) * self.global_batch, dtype=np.int64)
        epochs = positions // n
        parts = [self._order.rows(int(e), positions[epochs == e] % n) for e in np.unique(epochs)]
        return np.concatenate(parts)

    def joined(self, batch: int) -> frozenset[str]:
        return self._joined

    def position(self, batch: int) -> dict[str, int]:
        consumed = batch * self.global_batch
        return {"epoch": consumed // self._order.num_rows, "stage": 0, "rows_consumed": consumed}

    def identity(self) -> dict[str, Any]:
        return {
            "plan": "epochs",
            "order_version": ORDER_VERSION,
            "num_rows": self._order.num_rows,
            "global_batch": self.global_batch,
            "seed": self._order.seed,
            "mode": self._order.mode,
            "joined": sorted(self._joined),
        }
