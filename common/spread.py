"""Mean, spread and interval of a few runs' figures, and what they allow to say. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# 0.975 quantiles of Student's t for 1, 2, ... degrees of freedom (NIST/SEMATECH e-Handbook, 1.3.6.7.2).
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (n - 1 in the denominator) and number of values; `sd` is NaN for one value."""

    mean: float
    sd: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError: no value."""
        if not values:
            raise ValueError("no value to take a mean of")
        sd = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(statistics.mean(values), sd, len(values))

    def interval(self) -> tuple[float, float]:
        """Two-sided 95 % interval of the mean by Student's t; (-inf, inf) for one value."""
        if self.count == 1:
            return -math.inf, math.inf
        half = T_QUANTILES[min(self.count - 1, len(T_QUANTILES)) - 1] * self.sd / math.sqrt(self.count)
        return self.mean - half, self.mean + half

    def format(self, *, sign: bool = False) -> str:
        """`3.4459 ± 0.0102`; one value stands alone."""
        mean = f"{self.mean:+.4f}" if sign else f"{self.mean:.4f}"
        return mean if self.count == 1 else f"{mean} ± {self.sd:.4f}"


def differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """First minus second, pair by pair. Raises ValueError: not equally many."""
    return [a - b for a, b in zip(first, second, strict=True)]


def is_gain(gains: Sequence[float]) -> bool | None:
    """True or False where the 95 % interval of the mean lies on one side of 0; None: it cannot be told."""
    low, high = Spread.of(gains).interval()
    if low > 0:
        return True
    return False if high < 0 else None
