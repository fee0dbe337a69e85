"""What each source of a run had of it: sums beside those of the whole step, and their means in a line of metrics.

A run of one source has none of this: its lines are as they are without sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from potstill.kernels.types import LossSums

COUNTS = ("rows", "tokens")  # of the host; the sums of the loss come from the device
Figures = dict[str, dict[str, float | None]]


def source_sum_names(sources: Sequence[str]) -> tuple[str, ...]:
    """Names of the sums of the loss by source, in the order of TrainRequest's; none for one source."""
    return tuple(_name(source, figure) for source in sources for figure in LossSums.names()) if len(sources) > 1 else ()


def source_count_names(sources: Sequence[str]) -> tuple[str, ...]:
    """Names of the counts by source, source by source; none for one source."""
    return tuple(_name(source, count) for source in sources for count in COUNTS) if len(sources) > 1 else ()


def _name(source: str, figure: str) -> str:
    return f"{source}/{figure}"


def source_figures(sums: Mapping[str, float], sources: Sequence[str]) -> Figures:
    """By source: rows, tokens, positions (trained on: a label, and a weight that is not 0), and the means ce and kd.

    The means are over the weights of the positions; None where nothing was counted. Empty for one source.
    """
    if len(sources) < 2:
        return {}

    def mean(source: str, name: str, weight: str) -> float | None:
        total = sums[_name(source, weight)]
        return sums[_name(source, name)] / total if total > 0 else None

    return {
        source: {
            "rows": sums[_name(source, "rows")],
            "tokens": sums[_name(source, "tokens")],
            "positions": sums[_name(source, "num_labels")],
            "ce": mean(source, "ce", "label_weight"),
            "kd": mean(source, "kd", "kd_weight"),
        }
        for source in sources
    }


def source_totals(lines: Iterable[Mapping[str, Any]]) -> Figures:
    """Over the training lines of a run: counts added up, means of the newest line that has them. Empty for one source.

    A resumed run's lines are those of an uninterrupted one, and so are these.
    """
    found: Figures = {}
    for line in lines:
        for source, figures in line.get("sources", {}).items():
            total = found.setdefault(source, {"rows": 0.0, "tokens": 0.0, "positions": 0.0, "ce": None, "kd": None})
            for name, value in figures.items():
                if name in ("ce", "kd"):
                    total[name] = total[name] if value is None else value
                elif value is not None:
                    total[name] = (total[name] or 0.0) + value
    return found


def source_text(figures: Figures) -> str:
    """For the console: the label loss of each source, and its share of the tokens."""
    whole = sum(own["tokens"] or 0.0 for own in figures.values())
    parts = []
    for source, own in figures.items():
        share = f"{(own['tokens'] or 0.0) / whole:.1%}" if whole else "0%"
        parts.append(f"{source} {share}" + ("" if own["ce"] is None else f" ce {own['ce']:.4f}"))
    return ", ".join(parts)
