"""How often ids occur in a tokens store, for stores whose ids are ranked by frequency (docs/format.md)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from potstill.storage import StoreReader

NUM_PLACES = 64
TOKENS_PER_PLACE = 8192  # about one record batch, which is read as a whole


def id_frequencies(tokens: StoreReader) -> NDArray[np.int64]:
    """Occurrences [V] of each id in 64 pieces of a tokens store, spread evenly over it; in all of a small store.

    The same for every worker, as the ranks are part of what a store is. A teacher's entries are not its text, but a
    frequent token is among the entries often too; a wrong rank costs bytes, never a value.
    """
    rows_per_place = max(1, TOKENS_PER_PLACE // tokens.spec.row_length)
    starts = np.linspace(0, max(0, tokens.num_rows - rows_per_place), NUM_PLACES).astype(np.int64)
    rows = np.unique((starts[:, None] + np.arange(rows_per_place)).clip(max=tokens.num_rows - 1))
    counts = np.zeros(tokens.spec.vocab_size, np.int64)
    for first in range(0, len(rows), rows_per_place):
        for row in tokens.tokens_rows(rows[first : first + rows_per_place]):
            counts += np.bincount(row.tokens, minlength=len(counts))
    return counts
