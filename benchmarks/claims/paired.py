"""Comparisons of arms, pair by pair.

The same seed is the same initial weights and, where no rows are selected, the same rows in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.claims.base import Finding
from potstill.common.spread import Spread, differences


def cohens_d(values: Sequence[float]) -> float | None:
    """Mean of the paired differences over their standard deviation (Cohen's d_z); None for one pair or equal ones."""
    spread = Spread.of(values)
    return spread.mean / spread.sd if spread.count > 1 and spread.sd > 0 else None


def compare(
    text: str,
    better: Sequence[float],
    worse: Sequence[float],
    *,
    unit: str = "nats",
    lower_is_better: bool = True,
    beyond_interval: bool = True,
    margin: float = 0.0,
    rule: bool = True,
) -> Finding:
    """Whether the first arm is better than the second, by paired differences with Student's t.

    The effect is the gain of `better` over `worse` (positive: better). It passes when the whole 95 % interval of the
    mean gain lies above -margin; with beyond_interval=False when the mean does (for rules that say "at least as good").
    """
    gains = differences(worse, better) if lower_is_better else differences(better, worse)
    spread = Spread.of(gains)
    interval = spread.interval()
    passed = interval[0] > -margin if beyond_interval else spread.mean >= -margin
    return Finding(
        text=text,
        passed=passed,
        effect=spread.mean,
        unit=unit,
        values=tuple(gains),
        interval=interval,
        standardised=cohens_d(gains),
        rule=rule,
    )


def count(text: str, holds: Sequence[bool], at_least: int, *, of: str = "seeds", rule: bool = True) -> Finding:
    """Whether something holds in at least so many seeds (or samples: one of COUNTED)."""
    number = sum(holds)
    return Finding(
        text=f"{text} (in at least {at_least} of {len(holds)} {of})",
        passed=number >= at_least,
        effect=float(number),
        unit=of,
        values=tuple(float(value) for value in holds),
        rule=rule,
    )


def steady(arm: str, values: Sequence[float], at_most: float = 0.03, *, rule: bool = False) -> Finding:
    """Whether an arm's figures, in nats, spread over the seeds by no more than this standard deviation."""
    spread = Spread.of(values).sd
    return Finding(
        text=f"{arm} spread over the seeds by at most {at_most:g} nats (standard deviation)",
        passed=spread <= at_most,
        effect=spread,
        unit="nats",
        values=tuple(values),
        rule=rule,
    )


def most(seeds: int) -> int:
    """Four of five seeds, and as large a share of another number, rounded up."""
    return math.ceil(0.8 * seeds)


def written(values: Sequence[float | None], digits: int = 4) -> tuple[str, ...]:
    """Figures by seed as text; None is "never"."""
    return tuple("never" if value is None else f"{value:.{digits}f}" for value in values)


def mean_and_sd(values: Sequence[float], digits: int = 4) -> str:
    """`3.4459 ± 0.0102`; one value stands alone."""
    spread = Spread.of(values)
    mean = f"{spread.mean:.{digits}f}"
    return mean if spread.count == 1 else f"{mean} ± {spread.sd:.{digits}f}"
