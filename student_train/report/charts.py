"""Curves of runs as plotly figures: which figures are drawn, over what, and how a run looks in every one of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Each stands out (contrast 3 or more) from the page's background in its light and in its dark form.
COLOURS = ("#2a7fc9", "#d9534f", "#2e9155", "#9467bd", "#c0761a", "#7f7f7f", "#12909a", "#c2549d", "#8a7a1f", "#a8634a")
# From the second run on: a dashed line shows the one below it, where two runs have the same figure.
DASHES = ("solid", "8px,4px", "2px,3px", "11px,3px,2px,3px")
FEW_POINTS = 30  # a shorter curve has a marker at each point

# What the x axis may be, and its title.
AXES = {"tokens": "tokens", "step": "step", "runtime_seconds": "wall time (s)"}


@dataclass(frozen=True)
class Chart:
    """One chart: its title, and the kind of record and the figure on its y axis."""

    title: str
    kind: str
    figure: str
    is_share: bool = False


CHARTS = (
    Chart("Held-out loss (nats)", "eval", "heldout_loss"),
    Chart("Held-out answers right", "eval", "answer_accuracy", is_share=True),
    Chart("Held-out answers passed", "eval", "answer_pass_rate", is_share=True),
    Chart("Training loss (nats, own objective)", "train", "loss"),
    Chart("Held-out agreement with teacher", "eval", "agreement", is_share=True),
    Chart("Held-out KL to the teacher (nats)", "eval", "teacher_kl"),
    Chart("Held-out calibration error", "eval", "calibration_error"),
    Chart("Cross-entropy (nats)", "train", "ce"),
    Chart("KD term (nats)", "train", "kd"),
    Chart("Load balancing loss", "train", "router_aux"),
    Chart("Agreement with the teacher", "train", "agreement", is_share=True),
    Chart("Share of rows drawn from", "train", "row_share", is_share=True),
    Chart("Share of positions trained on", "train", "selected_share", is_share=True),
    Chart("Share of positions whose KD counts", "train", "kd_share", is_share=True),
    Chart("Share of FLOPs saved by selection", "train", "flops_saved_share", is_share=True),
    Chart("Learning rate", "train", "lr"),
    Chart("Gradient norm", "train", "grad_norm"),
    Chart("Tokens per second", "train", "tokens_per_second"),
)


@dataclass(frozen=True)
class RunRecords:
    """A run as the report sees it."""

    name: str
    folder: Path
    records: list[dict[str, Any]]
    config: dict[str, Any]
    is_done: bool

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Its records of one kind, in order."""
        return [record for record in self.records if record["kind"] == kind]

    @property
    def state(self) -> str:
        """done, or how far it came."""
        if self.is_done:
            return "done"
        total = self.config["run"]["max_steps"]
        return "not done" if total is None else f"not done ({self.last('train', 'step') or 0:,} of {total:,} steps)"

    def last(self, kind: str, figure: str) -> Any:
        """The newest value of a figure, or None."""
        found = [record[figure] for record in self.of_kind(kind) if figure in record]
        return found[-1] if found else None


def colour(index: int) -> str:
    """The colour of run number `index`, in charts and in the legend."""
    return COLOURS[index % len(COLOURS)]


def dash(index: int) -> str:
    """The dashes of its line, as plotly and SVG both read them."""
    return DASHES[index % len(DASHES)]


def marker_sizes(values: Sequence[float | None]) -> int | list[int] | None:
    """Sizes of the markers of a curve whose gaps are None: all points of a short one, else only those between gaps,
    which no line would show; None where no point needs one."""
    there = [value is not None for value in values]
    if sum(there) <= FEW_POINTS:
        return 6
    padded = [False, *there, False]
    alone = [padded[n + 1] and not padded[n] and not padded[n + 2] for n in range(len(there))]
    return [7 if is_alone else 0 for is_alone in alone] if any(alone) else None


def curve(run: RunRecords, index: int, chart: Chart) -> tuple[Any, dict[str, list[Any]]] | None:
    """The plotly trace of a run over tokens, and its x values for every axis; None where nothing was measured.

    A figure that is null (not finite, or nothing to measure) is a gap: a line over it would show what nobody measured.
    """
    from plotly import graph_objects as go

    records = [record for record in run.of_kind(chart.kind) if chart.figure in record]
    values = [record[chart.figure] for record in records]
    values = [value if value is not None and math.isfinite(value) else None for value in values]
    if all(value is None for value in values):
        return None
    sizes = marker_sizes(values)
    style = {} if sizes is None else {"marker": {"size": sizes, "opacity": 1.0, "line": {"width": 0}}}
    places = {axis: [record.get(axis) for record in records] for axis in AXES}
    trace = go.Scatter(
        name=run.name,
        x=places["tokens"],
        y=values,
        mode="lines" if sizes is None else "lines+markers",
        line={"color": colour(index), "dash": dash(index), "width": 2},
        connectgaps=False,
        meta={"run": index},
        hovertemplate="%{y:.2%}" if chart.is_share else "%{y:.5g}",
        **style,
    )
    return trace, places


def draw(chart: Chart, runs: Sequence[RunRecords]) -> dict[str, Any] | None:
    """One chart as plain values: `figure` for plotly, and `x`, per axis the values of each trace. None when empty."""
    from plotly import graph_objects as go

    curves = [found for index, run in enumerate(runs) if (found := curve(run, index, chart)) is not None]
    if not curves:
        return None
    figure = go.Figure([trace for trace, _ in curves])
    figure.update_layout(
        template="none",
        height=290,
        margin={"l": 12, "r": 14, "t": 32, "b": 8},  # above: the caption, and plotly's buttons, which hide no curve
        showlegend=False,
        hovermode="x unified",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        xaxis={
            "title": {"text": AXES["tokens"], "standoff": 8},
            "automargin": True,
            "zeroline": False,
            "nticks": 7,
            "hoverformat": ",~f",
        },
        yaxis={"automargin": True, "zeroline": False, "exponentformat": "e", "nticks": 6},
    )
    if chart.is_share:
        figure.update_yaxes(tickformat=".3~%")
    return {
        "title": chart.title,
        "kind": chart.kind,
        "name": chart.figure,
        "figure": json.loads(figure.to_json()),
        "x": {axis: [places[axis] for _, places in curves] for axis in AXES},
    }


def draw_all(runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    """All charts that any run has figures for."""
    return [drawn for chart in CHARTS if (drawn := draw(chart, runs)) is not None]
