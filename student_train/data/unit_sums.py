"""Sums over rows or documents, for weights whose mean is taken over these and not over their positions.

PACED (arXiv 2603.11178) weighs problems, with mean 1 over the problems of a batch; a long answer then counts no more in
that mean than a short one. The sums of all ranks are added up before the step (run/step_watch.py), so that the mean is
the same at any micro-batch and any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from potstill.kernels.types import IGNORE_LABEL
from potstill.storage import TokensRow


@dataclass(frozen=True)
class UnitSums:
    """Of the rows or documents with a trained position: how many, the sum of their weights; of their positions: chosen.

    count: of rows or documents, each once; weight: sum of their weights, 0 of what the store says nothing of;
    chosen: sum of what a token selector leaves of the positions (1 each without one), before weights.
    """

    count: float
    weight: float
    chosen: float


NOTHING = UnitSums(0.0, 0.0, 0.0)


def total(parts: Iterable[UnitSums | None]) -> UnitSums | None:
    """Sums of several micro-batches; None where they have none."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    return UnitSums(
        count=sum(part.count for part in found),
        weight=sum(part.weight for part in found),
        chosen=sum(part.chosen for part in found),
    )


def unit_sums(
    rows: Sequence[TokensRow],
    labels: NDArray[np.int64],
    factors: NDArray[np.float32],
    *,
    of: Literal["row", "document"],
    chosen: float,
) -> UnitSums:
    """Sums of these rows or of their documents; labels, factors [N]: of their tokens, row after row.

    The factor of a token is the weight of its row or document; `chosen` is handed on.
    """
    lengths = [np.array([len(row.tokens)]) if of == "row" else row.doc_lens for row in rows]
    sizes = np.concatenate(lengths)
    unit = np.repeat(np.arange(len(sizes)), sizes)
    trained = np.flatnonzero(labels != IGNORE_LABEL)
    _, first = np.unique(unit[trained], return_index=True)
    return UnitSums(float(len(first)), float(factors[trained[first]].sum(dtype=np.float64)), chosen)
