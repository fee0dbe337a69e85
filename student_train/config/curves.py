"""Numbers that may change over a stage: a constant, or a curve of the table CURVES.

A new curve is one class that knows its value at any place and the values between which it is monotone, and one entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.common.config import StrictModel
from potstill.common.named_entries import KindIn, NameIn

# How a decay falls: share of it that is done, in [0, 1] -> from 1 to 0.
DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "sqrt": lambda x: 1.0 - math.sqrt(x),
}
DecayShape = Annotated[str, NameIn(DECAY_SHAPES)]


class Curve(StrictModel):
    """A number over a stage. The group of keys has a key `kind`, which names the curve in CURVES."""

    def at(self, x: float) -> float:
        """Value at x in [0, 1] of the stage; both ends are reached."""
        raise NotImplementedError

    @property
    def corners(self) -> tuple[float, ...]:
        """Values between which the curve is monotone: it takes none below the least or above the largest of them."""
        raise NotImplementedError


class Linear(Curve):
    """Straight line over the stage."""

    kind: Literal["linear"] = Field(default="linear", description="A straight line")
    start: float = Field(description="Value at the first step of the stage")
    end: float = Field(description="Value at the last step of the stage")

    def at(self, x: float) -> float:
        return self.start + (self.end - self.start) * x

    @property
    def corners(self) -> tuple[float, ...]:
        return (self.start, self.end)


class Cosine(Curve):
    """Half a cosine over the stage."""

    kind: Literal["cosine"] = Field(default="cosine", description="Half a cosine")
    start: float = Field(description="Value at the first step of the stage")
    end: float = Field(description="Value at the last step of the stage")

    def at(self, x: float) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * x))

    @property
    def corners(self) -> tuple[float, ...]:
        return (self.start, self.end)


class LinearRatio(Curve):
    """A share whose ratio to the rest is a straight line."""

    kind: Literal["linear_ratio"] = Field(default="linear_ratio", description="value / (1 - value) is a straight line")
    start: float = Field(ge=0, lt=1, description="Value at the first step of the stage")
    end: float = Field(ge=0, lt=1, description="Value at the last step of the stage")

    def at(self, x: float) -> float:
        """The ratio moves linearly: an alpha that falls does so fast at first (SALT's third transition)."""
        start, end = (value / (1.0 - value) for value in (self.start, self.end))
        ratio = start + (end - start) * x
        return ratio / (1.0 + ratio)

    @property
    def corners(self) -> tuple[float, ...]:
        return (self.start, self.end)


class Wsd(Curve):
    """Warm-up, stable, decay over the stage."""

    kind: Literal["wsd"] = Field(default="wsd", description="Warm-up, stable, decay")
    start: float = Field(default=0.0, description="Value before the warm-up")
    peak: float = Field(description="Value of the stable phase")
    end: float = Field(default=0.0, description="Value after the decay")
    warmup: float = Field(default=0.1, ge=0, le=1, description="Share of the stage that warms up")
    decay: float = Field(default=0.2, ge=0, le=1, description="Share of the stage that decays")
    decay_shape: DecayShape = Field(default="cosine", description="Shape of the decay")

    @model_validator(mode="after")
    def _fits(self) -> Wsd:
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} + decay {self.decay} is more than the whole stage")
        return self

    def at(self, x: float) -> float:
        """For an alpha on the clock of a learning rate that warms up, stays and decays."""
        if x < self.warmup:
            return self.start + (self.peak - self.start) * x / self.warmup
        if x <= 1.0 - self.decay:
            return self.peak
        done = (x - (1.0 - self.decay)) / self.decay
        return self.end + (self.peak - self.end) * DECAY_SHAPES[self.decay_shape](done)

    @property
    def corners(self) -> tuple[float, ...]:
        return (self.start, self.end, self.peak)


class Periodic(Curve):
    """Whole cosine periods over the stage, to `end` and back to `start` in each."""

    kind: Literal["periodic"] = Field(default="periodic", description="Whole cosine periods")
    start: float = Field(description="Value at the start and the end of each period")
    end: float = Field(description="Value in the middle of each period")
    periods: int = Field(default=1, ge=1, description="Periods in the stage")

    def at(self, x: float) -> float:
        """An alpha of the study in arXiv 2410.16215, whose number of periods is not known; it ends where it starts."""
        share = 0.5 * (1.0 - math.cos(2.0 * math.pi * self.periods * x))
        return self.start * (1.0 - share) + self.end * share

    @property
    def corners(self) -> tuple[float, ...]:
        return (self.start, self.end)


CURVES: dict[str, type[Curve]] = {
    "linear": Linear,
    "cosine": Cosine,
    "linear_ratio": LinearRatio,
    "wsd": Wsd,
    "periodic": Periodic,
}
Scalar = float | Annotated[Curve, KindIn(CURVES)]


def check_bounds(name: str, scalar: Scalar | None, *, low: float, high: float, open_low: bool = False) -> None:
    """Raise ValueError when a scalar can leave [low, high] (or (low, high] with `open_low`)."""
    if scalar is None:
        return
    for value in scalar.corners if isinstance(scalar, Curve) else (float(scalar),):
        if not (low <= value <= high) or (open_low and value == low):
            raise ValueError(f"{name} takes the value {value}; it must lie in {'(' if open_low else '['}{low}, {high}]")
