"""Schedules as pure functions of the step: learning rate, and every scalar of the curriculum.

Nothing here keeps state, so a resumed run and an uninterrupted one see the same values.
"""

from __future__ import annotations

import math

from potstill.student_train.config.train import (
    Cosine,
    Curve,
    Linear,
    LinearRatio,
    LrSchedule,
    Periodic,
    Scalar,
    Span,
    Wsd,
)

DECAY_SHAPES = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "sqrt": lambda x: 1.0 - math.sqrt(x),
}


def span_steps(span: Span, total_steps: int) -> int:
    """Turn a length into steps: an int is a number of steps, a float a share of `total_steps` (rounded)."""
    return span if isinstance(span, int) else round(span * total_steps)


def lr_factor(schedule: LrSchedule, step: int, total_steps: int) -> float:
    """Factor on the peak learning rate for step 0..total_steps-1 (0 counts: the first step already moves).

    Warm-up is linear and reaches 1 at its last step. `cosine` and `linear` fall to `min_ratio` at `total_steps`.
    `wsd` (warm-up, stable, decay) stays at 1 until `decay` steps before the end: the stable phase does not know the
    total, so one checkpoint of it can be branched into many decays by changing `run.max_steps` alone.
    """
    warmup = span_steps(schedule.warmup, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    floor = schedule.min_ratio
    if schedule.kind == "constant":
        return 1.0
    decay = span_steps(schedule.decay, total_steps) if schedule.kind == "wsd" else total_steps - warmup
    start = max(total_steps - decay, warmup)
    if step < start:
        return 1.0
    shape = {"linear": "linear", "cosine": "cosine", "wsd": schedule.decay_shape}[schedule.kind]
    done = min((step - start) / max(total_steps - start, 1), 1.0)
    return floor + (1.0 - floor) * DECAY_SHAPES[shape](done)


def lr_factor_at(schedule: LrSchedule, step: int, *, total_steps: int, first_step: int, end_step: int) -> float:
    """Factor on the peak learning rate at `step` of a run of `total_steps`, in its stage [first_step, end_step).

    With `span: stages` each stage is a schedule of its own (POCL, arXiv 2506.05695): lengths count from its first step,
    shares are of its length. The last stage ends with the run.
    """
    if schedule.span == "stages":
        return lr_factor(schedule, step - first_step, end_step - first_step)
    return lr_factor(schedule, step, total_steps)


def _wsd(curve: Wsd, x: float) -> float:
    """Warm-up, stable, decay of a scalar (papers: alpha on the clock of the learning rate)."""
    if x < curve.warmup:
        return curve.start + (curve.peak - curve.start) * x / curve.warmup
    if x <= 1.0 - curve.decay:
        return curve.peak
    done = (x - (1.0 - curve.decay)) / curve.decay
    return curve.end + (curve.peak - curve.end) * DECAY_SHAPES[curve.decay_shape](done)


def _linear_ratio(curve: LinearRatio, x: float) -> float:
    """alpha whose ratio alpha / (1 - alpha) moves linearly: fast at first when it falls (SALT's third transition)."""
    start, end = (value / (1.0 - value) for value in (curve.start, curve.end))
    ratio = start + (end - start) * x
    return ratio / (1.0 + ratio)


def _periodic(curve: Periodic, x: float) -> float:
    """Whole cosine periods (an alpha of the study in arXiv 2410.16215, whose number of periods is not known)."""
    share = 0.5 * (1.0 - math.cos(2.0 * math.pi * curve.periods * x))
    return curve.start * (1.0 - share) + curve.end * share


def curve_value(curve: Curve, x: float) -> float:
    """Value of a curve at x in [0, 1] of its span; both ends are reached (a periodic one ends where it starts)."""
    if isinstance(curve, Linear):
        return curve.start + (curve.end - curve.start) * x
    if isinstance(curve, Cosine):
        return curve.end + (curve.start - curve.end) * 0.5 * (1.0 + math.cos(math.pi * x))
    if isinstance(curve, LinearRatio):
        return _linear_ratio(curve, x)
    if isinstance(curve, Periodic):
        return _periodic(curve, x)
    return _wsd(curve, x)


def scalar_value(scalar: Scalar, x: float) -> float:
    """Value of a constant or a curve at x in [0, 1]."""
    return float(scalar) if isinstance(scalar, int | float) else curve_value(scalar, x)


def scalar_bounds(scalar: Scalar) -> tuple[float, float]:
    """Smallest and largest value that a scalar can take; curves are monotone between their corner values."""
    if isinstance(scalar, int | float):
        return float(scalar), float(scalar)
    corners = [scalar.start, scalar.end, *([scalar.peak] if isinstance(scalar, Wsd) else [])]
    return min(corners), max(corners)


def share_of_span(step: int, first_step: int, end_step: int) -> float:
    """Place of `step` within [first_step, end_step): 0 at the first step, 1 at the last."""
    return min(max((step - first_step) / max(end_step - first_step - 1, 1), 0.0), 1.0)
