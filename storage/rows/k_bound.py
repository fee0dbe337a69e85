"""How often `top_p_k` stops at k before it reaches p: then the store holds less of the teacher than was asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from potstill.storage.rows.array_types import Float32

MAX_K = 255  # a store keeps the number of entries of a token in one byte
# A few flat positions are bound under any setting; from here on p is no longer what describes the store.
MUCH = 0.25


@dataclass(frozen=True)
class KBound:
    """Over positions with a target: the share where k ended the prefix below the mass p, and the mean kept mass.

    can_draw: whether the same teacher could give draws instead.
    """

    k: int
    p: float
    share: float
    kept_mass: float
    can_draw: bool = True

    @property
    def much(self) -> bool:
        """Whether somebody should hear of it before the whole corpus is dumped."""
        return self.share >= MUCH

    def describe(self, bytes_per_token: float | None) -> str:
        """One line: what was asked for, what is kept, what it weighs, and what to do if it is far from it."""
        size = "" if bytes_per_token is None else f", {bytes_per_token:.1f} B/token"
        line = (
            f"kept mass {self.kept_mass:.4f} on average, p = {self.p:g} was asked; k = {self.k} ends the entries "
            f"below p at {self.share:.1%} of positions{size}"
        )
        return f"{line}; {self.advice()}" if self.much else line

    def advice(self) -> str:
        """What to do about it, with what that costs."""
        ways = [f"raise k ({MAX_K} at most; about 2 bytes for each entry more)"] if self.k < MAX_K else []
        ways.append("lower p to what k can reach")
        if self.can_draw:
            ways.append("use mode sample (draws, unbiased whatever the entropy, fewer bytes)")
        return ", or ".join(filter(None, (", ".join(ways[:-1]), ways[-1])))


def bound_positions(num_entries: np.ndarray, log_tail: Float32, *, k: int, p: float) -> tuple[int, float]:
    """Positions [M] where k entries hold less than p, counted, and the sum of the kept mass over all M."""
    kept = -np.expm1(np.minimum(np.nan_to_num(log_tail.astype(np.float64)), 0.0))
    return int(((num_entries >= k) & (kept < p)).sum()), float(kept.sum())
