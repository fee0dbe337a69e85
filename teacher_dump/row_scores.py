"""Per-row statistics of a small language model's scores, for selectors that rank whole rows."""

from __future__ import annotations

import numpy as np

SCORE_STATS = (
    "mean_loss",
    "mean_entropy",
    "accuracy",
    "salt_median_zero",
    "salt_median_drop",
    "learnable_fraction",
    "num_targets",
)


def row_scores(loss: np.ndarray, rank: np.ndarray, entropy: np.ndarray, *, salt_rank: int) -> dict[str, float]:
    """Statistics over a row's target positions: loss [m] (nats), rank [m] (0 = argmax), entropy [m] (nats).

    SALT (arXiv 2410.18779) ranks sequences by the median loss over tokens whose label the small model has among its k
    best. The mask can be read two ways, and both are kept: a masked token counts as loss 0 in the median
    (`salt_median_zero`), or is left out of it (`salt_median_drop`). A row without targets has 0 everywhere.
    """
    if not len(loss):
        return dict.fromkeys(SCORE_STATS, 0.0)
    loss = loss.astype(np.float64)
    learnable = rank < salt_rank
    return {
        "mean_loss": float(loss.mean()),
        "mean_entropy": float(entropy.astype(np.float64).mean()),
        "accuracy": float((rank == 0).mean()),
        "salt_median_zero": float(np.median(np.where(learnable, loss, 0.0))),
        "salt_median_drop": float(np.median(loss[learnable])) if learnable.any() else 0.0,
        "learnable_fraction": float(learnable.mean()),
        "num_targets": float(len(loss)),
    }
