"""A row plan over several sources: a share of the rows for each, every source's rows once before any comes again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from potstill.storage.errors import StoreError
from potstill.storage.loading.mixture import MIXTURE_VERSION, Draw, MixedOrder, Mixture, source_seed, whole_weights
from potstill.storage.loading.order import ORDER_VERSION, Int64, RowOrder
from potstill.storage.loading.sources import Source


class MixturePlan:
    """Rows of every global batch drawn from several sources by their shares; see `Mixture` for how close it keeps."""

    def __init__(
        self,
        sources: Sequence[Source],
        shares: Mapping[str, float] | None = None,
        *,
        global_batch: int,
        seed: int,
        mode: str = "global",
        joined: Collection[str] = (),
    ) -> None:
        """`shares` of the rows by name of the source (of their sum); None: each by the number of its rows.

        Raises StoreError for an unknown name, shares that say nothing, a source without rows that has a share, and a
        batch that is no number of rows.
        """
        names = [source.name for source in sources]
        unknown = sorted(set(shares or ()) - set(names))
        if unknown:
            raise StoreError(f"plan: shares name {unknown}, the sources are {names}")
        self._rows = [(source.name, source.tokens.num_rows) for source in sources]
        wanted = [float(rows) if shares is None else shares.get(name, 0.0) for name, rows in self._rows]
        empty = [name for (name, rows), share in zip(self._rows, wanted, strict=True) if share and not rows]
        if empty:
            raise StoreError(f"plan: sources {empty} hold no rows; leave them out of the shares")
        if global_batch < 1:
            raise StoreError(f"plan: a batch of {global_batch} rows; expected at least 1")
        firsts = np.cumsum([0, *(rows for _, rows in self._rows)]).tolist()
        draws = [
            Draw(RowOrder(rows, seed=source_seed(seed, name), mode=mode), first_row=first)
            for (name, rows), first in zip(self._rows, firsts, strict=False)
        ]
        self.global_batch = global_batch
        self._order = MixedOrder(Mixture(whole_weights(wanted)), draws)
        self._seed, self._mode, self._joined = seed, mode, frozenset(joined)

    def rows(self, batch: int) -> Int64:
        """Global row ids [global_batch] of global batch `batch`."""
        if batch < 0:
            raise StoreError(f"plan: batch {batch} is negative")
        return self._order.rows(np.arange(batch * self.global_batch, (batch + 1) * self.global_batch, dtype=np.int64))

    def joined(self, batch: int) -> frozenset[str]:
        """Names of the joined stores that each batch reads, of those sources that have them."""
        return self._joined

    def position(self, batch: int) -> dict[str, int]:
        """Where batch `batch` starts; an epoch is as many rows as all sources hold."""
        consumed = batch * self.global_batch
        return {"epoch": consumed // sum(rows for _, rows in self._rows), "stage": 0, "rows_consumed": consumed}

    def identity(self) -> dict[str, Any]:
        """JSON that pins everything the rows depend on; compared when a state is loaded."""
        return {
            "plan": "mixture",
            "order_version": ORDER_VERSION,
            "mixture_version": MIXTURE_VERSION,
            "sources": [list(pair) for pair in self._rows],
            "weights": list(self._order.mixture.weights),
            "global_batch": self.global_batch,
            "seed": self._seed,
            "mode": self._mode,
            "joined": sorted(self._joined),
        }
