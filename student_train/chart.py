"""Curves as inline SVG: round ticks, room for their labels, and lines that stay apart where they lie on each other."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

COLOURS = ("#1f6fb4", "#d1495b", "#2e8b57", "#8a5fbf", "#c77d11", "#4a4a4a", "#0f8b8d", "#a0522d")
# From the second run on: a dashed line shows the one below it, where two runs have the same figure.
DASHES = ("", "7 4", "2 3", "10 3 2 3")
WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 62, 26, 10, 30
Points = Sequence[tuple[float, float]]


def dashes(index: int) -> str:
    """The SVG attribute of the line of run number `index`."""
    pattern = DASHES[index % len(DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def key(index: int) -> str:
    """The sign of run number `index` for a legend."""
    return (
        '<svg class="key" viewBox="0 0 34 10" width="34" height="10" aria-hidden="true"><line x1="1" x2="33" y1="5" '
        f'y2="5" stroke="{COLOURS[index % len(COLOURS)]}" stroke-width="3"{dashes(index)}/></svg>'
    )


def tick_step(low: float, high: float, *, most: int) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that needs at most `most` steps from low to high."""
    least = (high - low) / most
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= least * (1 - 1e-9))


def ticks(low: float, high: float, *, most: int = 5) -> list[float]:
    """Round numbers inside [low, high], low < high."""
    step = tick_step(low, high, most=most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_label(value: float) -> str:
    """A short form: 250k, 1.5M, 0.0005."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "")):
        if abs(value) >= size:
            return f"{value / size:.6g}{unit}" if unit else f"{value / 1e3:.6g}k"
    return f"{value:.6g}"


def value_range(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper end of the y axis: whole steps around the values; a single value lies in the middle."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = abs(low) * 0.1 or 1.0
        low, high = low - half, high + half
    step = tick_step(low, high, most=5)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def pieces(points: Points) -> list[Points]:
    """The stretches between points without a value (y is NaN): a line over a gap would show what nobody measured."""
    found: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            found[-1].append((x, y))
        elif found[-1]:
            found.append([])
    return [piece for piece in found if piece]


def curve(points: Points, index: int) -> str:
    """The lines of one run in pixels, broken at gaps, and a dot where a point stands alone."""
    colour, parts = COLOURS[index % len(COLOURS)], []
    for piece in pieces(points):
        if len(piece) == 1:
            parts.append(f'<circle cx="{piece[0][0]:.1f}" cy="{piece[0][1]:.1f}" r="3.5" fill="{colour}"/>')
            continue
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in piece)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dashes(index)}/>')
    return "".join(parts)


def chart(title: str, series: Sequence[tuple[str, Points]]) -> str:
    """One SVG figure; y NaN is a gap. A series without points is left out, a chart without series is empty."""
    points = [(x, y) for _, line in series for x, y in line if math.isfinite(y)]
    if not points:
        return ""
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    x1 = x1 if x1 > x0 else x0 + 1
    y0, y1 = value_range([y for _, y in points])

    def across(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP)

    base = HEIGHT - BOTTOM
    parts = [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}" stroke="#888"/>']
    for y in ticks(y0, y1):
        at = f"{down(y):.1f}"
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" text-anchor="end" dy="4">{tick_label(y)}</text>')
    for x in ticks(x0, x1, most=6):
        at = f"{across(x):.1f}"
        parts.append(f'<line x1="{at}" x2="{at}" y1="{base}" y2="{base + 4}" stroke="#888"/>')
        parts.append(f'<text x="{at}" y="{HEIGHT - 10}" text-anchor="middle">{tick_label(x)}</text>')
    parts += [
        curve([(across(x), down(y)) for x, y in line], index) for index, (_, line) in enumerate(series) if len(line)
    ]
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" font-size="11" fill="#444" role="img">{"".join(parts)}</svg></figure>'
    )
