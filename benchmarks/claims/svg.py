"""Plots as SVG files: a thin line for each seed, a thick one for the mean of an arm; nothing but text is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from benchmarks.claims.base import Plot
from potstill.student_train.report.charts import COLOURS

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 36, 46
TICKS = 5

Curve = Sequence[tuple[float, float]]


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """The mean over seeds at each x that all have, in order."""
    shared = set.intersection(*({x for x, _ in curve} for curve in curves)) if curves else set()
    tables = [dict(curve) for curve in curves]
    return [(x, sum(table[x] for table in tables) / len(tables)) for x in sorted(shared)]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, about TICKS of them."""
    if high <= low:
        return [low]
    raw = (high - low) / TICKS
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


class _Scale:
    """From figures to places on the page."""

    def __init__(self, plot: Plot) -> None:
        points = [point for curves in plot.curves.values() for curve in curves for point in curve]
        xs, ys = [self._x_value(plot, x) for x, _ in points], [y for _, y in points]
        self._plot = plot
        self.x_low, self.x_high = min(xs), max(xs)
        spare = 0.04 * (max(ys) - min(ys) or 1.0)
        self.y_low, self.y_high = min(ys) - spare, max(ys) + spare

    @staticmethod
    def _x_value(plot: Plot, x: float) -> float:
        return math.log10(max(x, 1.0)) if plot.log_x else x

    def x(self, value: float) -> float:
        share = (self._x_value(self._plot, value) - self.x_low) / (self.x_high - self.x_low or 1.0)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)

    def x_ticks(self) -> list[float]:
        if self._plot.log_x:
            return [10.0**power for power in range(math.ceil(self.x_low), math.floor(self.x_high) + 1)]
        return ticks(self.x_low, self.x_high)


def draw(plot: Plot) -> str:
    """The plot as one SVG document. Raises ValueError: nothing to draw."""
    if not any(curve for curves in plot.curves.values() for curve in curves):
        raise ValueError(f"plot {plot.name}: no point to draw")
    scale = _Scale(plot)
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" font-size="14" font-weight="bold">{escape(plot.title)}</text>',
        *_axes(plot, scale),
    ]
    for number, (arm, curves) in enumerate(plot.curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        parts += [_line(scale, curve, colour, width=0.8, opacity=0.45) for curve in curves if curve]
        parts.append(_line(scale, mean_curve(curves), colour, width=2.4, opacity=1.0))
        y = TOP + 12 + 18 * number
        parts.append(f'<line x1="{WIDTH - RIGHT + 12}" y1="{y}" x2="{WIDTH - RIGHT + 34}" y2="{y}" stroke="{colour}" '
                     'stroke-width="2.4"/>')  # fmt: skip
        parts.append(f'<text x="{WIDTH - RIGHT + 40}" y="{y + 4}">{escape(arm)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _axes(plot: Plot, scale: _Scale) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#555555"/>',
        f'<text x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">{escape(plot.x)}</text>',
        f'<text transform="translate(16 {(TOP + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(plot.y)}</text>",
    ]
    for value in ticks(scale.y_low, scale.y_high):
        y = scale.y(value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in scale.x_ticks():
        x = scale.x(value)
        parts.append(f'<path d="M{x:.1f} {bottom}v4" stroke="#555555"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>')
    return parts


def _line(scale: _Scale, curve: Curve, colour: str, *, width: float, opacity: float) -> str:
    points = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in curve)
    return (
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}"/>'
    )
