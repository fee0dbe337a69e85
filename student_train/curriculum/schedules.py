"""Numbers of the curriculum read off at a place of their stage. The curves themselves are in config/curves.py.

Nothing here keeps state, so a resumed run and an uninterrupted one see the same values.
"""

from __future__ import annotations

from potstill.student_train.config.curves import Curve, Scalar


def scalar_value(scalar: Scalar, x: float) -> float:
    """Value of a constant or a curve at x in [0, 1]."""
    return scalar.at(x) if isinstance(scalar, Curve) else float(scalar)


def scalar_bounds(scalar: Scalar) -> tuple[float, float]:
    """Smallest and largest value that a scalar can take."""
    corners = scalar.corners if isinstance(scalar, Curve) else (float(scalar),)
    return min(corners), max(corners)


def share_of_span(step: int, first_step: int, end_step: int) -> float:
    """Place of `step` within [first_step, end_step): 0 at the first step, 1 at the last."""
    return min(max((step - first_step) / max(end_step - first_step - 1, 1), 0.0), 1.0)
