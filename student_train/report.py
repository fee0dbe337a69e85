"""One HTML page about one or several runs: curves, final table, selection over time, differences of configuration.

The page is a single file without scripts or network: curves are inline SVG.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.common.errors import UserError
from potstill.student_train.metrics import read_metrics
from potstill.student_train.run_folder import read_done, read_run_config

COLOURS = ("#1f6fb4", "#d1495b", "#2e8b57", "#8a5fbf", "#c77d11", "#4a4a4a", "#0f8b8d", "#a0522d")
WIDTH, HEIGHT, LEFT, BOTTOM = 560, 240, 62, 34

# Title, kind of record, figure on the y axis, figure on the x axis.
CHARTS = (
    ("Loss over tokens", "train", "loss", "tokens"),
    ("Loss over wall time (s)", "train", "loss", "runtime_seconds"),
    ("Cross-entropy over tokens", "train", "ce", "tokens"),
    ("KD term over tokens", "train", "kd", "tokens"),
    ("Agreement with the teacher over tokens", "train", "agreement", "tokens"),
    ("Share of positions trained on, over tokens", "train", "selected_share", "tokens"),
    ("Share of positions whose KD counts, over tokens", "train", "kd_share", "tokens"),
    ("Held-out loss over tokens", "eval", "heldout_loss", "tokens"),
    ("Learning rate over tokens", "train", "lr", "tokens"),
    ("Gradient norm over tokens", "train", "grad_norm", "tokens"),
    ("Tokens per second over tokens", "train", "tokens_per_second", "tokens"),
)
TABLE = (
    ("steps", "train", "step"),
    ("tokens", "train", "tokens"),
    ("wall time (s)", "train", "runtime_seconds"),
    ("last loss", "train", "loss"),
    ("held-out loss", "eval", "heldout_loss"),
    ("perplexity", "eval", "perplexity"),
    ("accuracy", "eval", "accuracy"),
    ("agreement", "eval", "agreement"),
    ("KL to teacher", "eval", "teacher_kl"),
    ("calibration error", "eval", "calibration_error"),
    ("tokens / s", "train", "tokens_per_second"),
    ("peak memory (bytes)", "train", "peak_memory_bytes"),
    ("skipped steps", "train", "skipped_steps"),
)
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(500px, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 2px; }
"""


@dataclass(frozen=True)
class RunRecords:
    """A run as the report sees it."""

    name: str
    folder: Path
    records: list[dict[str, Any]]
    config: dict[str, Any]
    is_done: bool

    def points(self, kind: str, y: str, x: str) -> list[tuple[float, float]]:
        """(x, y) of every record of that kind that has both."""
        mine = [record for record in self.records if record["kind"] == kind]
        return [(float(r[x]), float(r[y])) for r in mine if r.get(x) is not None and r.get(y) is not None]

    def last(self, kind: str, figure: str) -> Any:
        """The newest value of a figure, or None."""
        found = [record[figure] for record in self.records if record["kind"] == kind and figure in record]
        return found[-1] if found else None


def read_run(folder: Path, label: str) -> RunRecords:
    """Read a run folder. Raises UserError."""
    config = read_run_config(folder)
    records = read_metrics(folder)
    if not records:
        raise UserError(f"run {folder} has no metrics yet; let it reach its first line (logging.every_steps)")
    return RunRecords(label, folder, records, config.model_dump(mode="json"), read_done(folder) is not None)


def labels_of(folders: Sequence[Path]) -> list[str]:
    """Folder names, or whole paths where two names are the same."""
    names = [folder.name for folder in folders]
    return [str(folder) if names.count(folder.name) > 1 else folder.name for folder in folders]


def number(value: Any) -> str:
    """A figure for a table."""
    if value is None:
        return "-"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return f"{int(value):,}" if isinstance(value, int | float) else str(value)


def chart(title: str, series: list[tuple[str, list[tuple[float, float]]]]) -> str:
    """One SVG figure; a series without points is left out, a chart without series is empty."""
    points = [point for _, line in series for point in line]
    if not points:
        return ""
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points, strict=True))
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + abs(y0 or 1) * 0.1)

    def place(x: float, y: float) -> str:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - 12)
        return f"{across:.1f},{HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - 12):.1f}"

    parts = []
    for step in range(5):
        y, x = y0 + (y1 - y0) * step / 4, x0 + (x1 - x0) * step / 4
        line_y, text_x = place(x0, y).split(",")[1], place(x, y0).split(",")[0]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 12}" y1="{line_y}" y2="{line_y}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{line_y}" text-anchor="end" dy="4">{html.escape(number(y))}</text>')
        parts.append(
            f'<text x="{text_x}" y="{HEIGHT - 12}" text-anchor="middle">{html.escape(number(round(x)))}</text>'
        )
    for index, (_, line) in enumerate(series):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(place(x, y) for x, y in line)
        if len(line) == 1:
            x, y = path.split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>')
        elif line:
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    inner = "".join(parts)
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" font-size="11" fill="#444" role="img">{inner}</svg></figure>'
    )


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a configuration."""
    if isinstance(tree, dict) and tree:
        return {key: value for name, part in tree.items() for key, value in flatten(part, f"{prefix}{name}.").items()}
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        return {k: v for i, part in enumerate(tree) for k, v in flatten(part, f"{prefix}{i}.").items()}
    return {prefix[:-1]: tree}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; cells are escaped here."""
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def render(runs: Sequence[RunRecords]) -> str:
    """The page."""
    names = [run.name for run in runs]
    keys = " &nbsp; ".join(
        f'<span><span class="key" style="background:{COLOURS[i % len(COLOURS)]}"></span>{html.escape(name)}</span>'
        for i, name in enumerate(names)
    )
    states = ["done" if run.is_done else "not done" for run in runs]
    figures = [[title, *(number(run.last(kind, key)) for run in runs)] for title, kind, key in TABLE]
    charts = [chart(title, [(run.name, run.points(kind, y, x)) for run in runs]) for title, kind, y, x in CHARTS]
    flat = [flatten(run.config) for run in runs]
    keys_of_all = sorted({key for tree in flat for key in tree})
    differing = [
        [key, *(str(tree.get(key, "-")) for tree in flat)]
        for key in keys_of_all
        if len({str(tree.get(key, "-")) for tree in flat}) > 1
    ]
    differences = table(["key", *names], differing) if differing else "<p>None (or a single run).</p>"
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>potstill report</title><style>{STYLE}</style>"
        f"<h1>potstill: {html.escape(', '.join(names))}</h1><p>{keys}</p>"
        f"<h2>Final figures</h2>{table(['', *names], [['state', *states], *figures])}"
        f"<h2>Curves</h2><div class='charts'>{''.join(charts)}</div>"
        f"<h2>Differences of configuration</h2>{differences}</html>\n"
    )


def write_report(folders: Sequence[Path], output: Path, *, force: bool = False) -> Path:
    """Write the page of these runs to `output`. Raises UserError."""
    if output.exists() and not force:
        raise UserError(f"{output} exists; name another file or use force")
    runs = [read_run(folder, label) for folder, label in zip(folders, labels_of(folders), strict=True)]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render(runs), encoding="utf-8")
    return output
