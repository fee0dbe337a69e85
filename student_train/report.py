"""One HTML page about one or several runs: curves, final table, selection over time, differences of configuration.

The page is a single file without scripts or network: curves are inline SVG.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.common.errors import UserError
from potstill.student_train.chart import chart, key
from potstill.student_train.metrics import read_metrics
from potstill.student_train.run_folder import read_done, read_run_config

# Title, kind of record, figure on the y axis, figure on the x axis.
CHARTS = (
    ("Training loss (nats, each run's own objective) over tokens", "train", "loss", "tokens"),
    ("Training loss (nats, each run's own objective) over wall time (s)", "train", "loss", "runtime_seconds"),
    ("Held-out loss (nats) over tokens", "eval", "heldout_loss", "tokens"),
    ("Held-out loss (nats) over wall time (s)", "eval", "heldout_loss", "runtime_seconds"),
    ("Held-out agreement with the teacher over tokens", "eval", "agreement", "tokens"),
    ("Held-out calibration error over tokens", "eval", "calibration_error", "tokens"),
    ("Cross-entropy (nats) over tokens", "train", "ce", "tokens"),
    ("KD term (nats) over tokens", "train", "kd", "tokens"),
    ("Agreement with the teacher over tokens", "train", "agreement", "tokens"),
    ("Share of rows drawn from, over tokens", "train", "row_share", "tokens"),
    ("Share of positions trained on, over tokens", "train", "selected_share", "tokens"),
    ("Share of positions whose KD counts, over tokens", "train", "kd_share", "tokens"),
    ("Share of FLOPs that the selection saved, over tokens", "train", "flops_saved_share", "tokens"),
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
    ("tokens / s (last line)", "train", "tokens_per_second"),
    ("MFU (last line)", "train", "mfu"),
    ("peak memory (bytes)", "train", "peak_memory_bytes"),
    ("skipped steps", "train", "skipped_steps"),
)
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px; padding: 0 1rem; color: #222;
  background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } td { max-width: 24rem; overflow-wrap: break-word; }
.values td:not(:first-child) { min-width: 6rem; overflow-wrap: anywhere; }
td, th { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
.legend { position: sticky; top: 0; background: #fff; padding: .5rem 0; border-bottom: 1px solid #ddd; }
.legend span { margin-right: 1.4em; white-space: nowrap; }
.legend .key { width: 34px; margin-right: .4em; vertical-align: middle; }
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
        """(x, y) of every record of that kind; y is NaN where it is null: not finite, or nothing to measure."""
        mine = [record for record in self.records if record["kind"] == kind and record.get(x) is not None]
        return [(float(r[x]), math.nan if r.get(y) is None else float(r[y])) for r in mine]

    @property
    def state(self) -> str:
        """done, or how far it came."""
        if self.is_done:
            return "done"
        total = self.config["run"]["max_steps"]
        return "not done" if total is None else f"not done ({self.last('train', 'step') or 0:,} of {total:,} steps)"

    def last(self, kind: str, figure: str) -> Any:
        """The newest value of a figure, or None."""
        found = [record[figure] for record in self.records if record["kind"] == kind and figure in record]
        return found[-1] if found else None


def read_run(folder: Path, label: str) -> RunRecords:
    """Read a run folder. Raises UserError."""
    config = read_run_config(folder)
    return RunRecords(
        label, folder, read_metrics(folder), config.model_dump(mode="json"), read_done(folder) is not None
    )


def labels_of(folders: Sequence[Path]) -> list[str]:
    """Folder names, or whole paths where two names are the same."""
    names = [folder.resolve().name for folder in folders]
    return [str(folder) if names.count(name) > 1 else name for folder, name in zip(folders, names, strict=True)]


def number(value: Any) -> str:
    """A figure for a table."""
    if value is None:
        return "-"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{int(value):,}" if isinstance(value, int | float) else str(value)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a configuration."""
    if isinstance(tree, dict) and tree:
        return {key: value for name, part in tree.items() for key, value in flatten(part, f"{prefix}{name}.").items()}
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        return {k: v for i, part in enumerate(tree) for k, v in flatten(part, f"{prefix}{i}.").items()}
    return {prefix[:-1]: tree}


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "figures") -> str:
    """An HTML table of that class; cells are escaped here."""
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table class='{kind}'><tr>{cells}</tr>{body}</table></div>"


def render(runs: Sequence[RunRecords]) -> str:
    """The page."""
    names = [run.name for run in runs]
    legend = "".join(f"<span>{key(i)}{html.escape(name)}</span>" for i, name in enumerate(names))
    states = [run.state for run in runs]
    figures = [[title, *(number(run.last(kind, name)) for run in runs)] for title, kind, name in TABLE]
    figures = [row for row in figures if any(cell != "-" for cell in row[1:])]
    charts = [chart(title, [(run.name, run.points(kind, y, x)) for run in runs]) for title, kind, y, x in CHARTS]
    flat = [flatten(run.config) for run in runs]
    values = {name: [str(tree.get(name, "-")) for tree in flat] for tree in flat for name in tree}
    values = {name: ["-" if value == "None" else value for value in cells] for name, cells in values.items()}
    differing = [[name, *values[name]] for name in sorted(values) if len(set(values[name])) > 1]
    differences = table(["key", *names], differing, kind="values") if differing else "<p>None (or a single run).</p>"
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>potstill report</title><style>{STYLE}</style>"
        f"<h1>potstill: {html.escape(', '.join(names))}</h1><div class='legend'>{legend}</div>"
        f"<h2>Final figures</h2>{table(['', *names], [['state', *states], *figures])}"
        f"<h2>Curves</h2><div class='charts'>{''.join(charts)}</div>"
        f"<h2>Differences of configuration</h2>{differences}</html>\n"
    )


def write_report(folders: Sequence[Path], output: Path, *, force: bool = False) -> Path:
    """Write the page of these runs to `output`. Raises UserError."""
    if output.exists() and not force:
        raise UserError(f"{output} exists; name another file or use --force")
    runs = [read_run(folder, label) for folder, label in zip(folders, labels_of(folders), strict=True)]
    if not any(run.records for run in runs):
        raise UserError(
            f"{', '.join(str(run.folder) for run in runs)}: no metrics yet; let a run reach its first line "
            "(logging.every_steps)"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render(runs), encoding="utf-8")
    return output
