"""One HTML page about one or several runs: figures, curves, samples of text, differences of configuration.

The page is a single file that loads nothing: plotly's script stands in it, and the data of all curves as JSON.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from potstill.common.disk_room import write_whole
from potstill.common.errors import UserError
from potstill.student_train.config.train import RunConfig
from potstill.student_train.report.charts import AXES, RunRecords, colour, dash, draw_all
from potstill.student_train.report.page import SCRIPT, STYLE
from potstill.student_train.run.metrics import read_metrics
from potstill.student_train.run.run_folder import read_done, read_run_config
from potstill.student_train.run.source_figures import source_totals

# Title, kind of record, figure.
HELDOUT = (
    ("step", "eval", "step"),
    ("tokens seen", "eval", "tokens"),
    ("loss (nats)", "eval", "heldout_loss"),
    ("perplexity", "eval", "perplexity"),
    ("accuracy", "eval", "accuracy"),
    ("answers right (greedy)", "eval", "answer_accuracy"),
    ("answers written exactly", "eval", "answer_exact"),
    ("mean grade of answers", "eval", "answer_grade"),
    ("answers passed", "eval", "answer_pass_rate"),
    ("entropy (nats)", "eval", "entropy"),
    ("calibration error", "eval", "calibration_error"),
    ("agreement with the teacher", "eval", "agreement"),
    ("KL to the teacher (nats)", "eval", "teacher_kl"),
    ("rows", "eval", "rows"),
    ("positions", "eval", "positions"),
    ("answers", "eval", "answers"),
    ("answers written", "eval", "answers_written"),
)
TRAINING = (
    ("steps", "train", "step"),
    ("tokens", "train", "tokens"),
    ("wall time (s)", "train", "runtime_seconds"),
    ("last loss", "train", "loss"),
    ("tokens / s (last line)", "train", "tokens_per_second"),
    ("MFU (last line)", "train", "mfu"),
    ("peak memory (bytes)", "train", "peak_memory_bytes"),
    ("skipped steps", "train", "skipped_steps"),
    ("loss spikes", "train", "loss_spikes"),
)
# Of a source: title, figure of source_totals ("share": of the run's tokens).
SOURCES = (
    ("rows", "rows"),
    ("tokens", "tokens"),
    ("share of the tokens", "share"),
    ("positions trained on", "positions"),
    ("last cross-entropy (nats)", "ce"),
    ("last KD term (nats)", "kd"),
)
FIGURE = ' class="figure"'
NOT_COMPARED = ("run.name", "run.output_dir")  # they differ always and stand in the page anyway


def read_run(folder: Path) -> RunRecords:
    """Read a run folder. Raises UserError."""
    config = read_run_config(folder)
    done = read_done(folder) is not None
    return RunRecords(config.run.name, folder, read_metrics(folder), config.model_dump(mode="json"), done)


def labels_of(runs: Sequence[tuple[str, Path]]) -> list[str]:
    """How (run.name, folder) are called: by the name, with the folder where names are the same.

    A run that was given no name is called by its folder.
    """
    unnamed = RunConfig.model_fields["name"].default
    folders = [folder.resolve().name for _, folder in runs]
    names = [folder if name == unnamed else name for (name, _), folder in zip(runs, folders, strict=True)]
    labels = [
        f"{name} ({folder})" if names.count(name) > 1 and name != folder else name
        for name, folder in zip(names, folders, strict=True)
    ]
    return [
        f"{name} ({folder})" if labels.count(label) > 1 else label
        for label, name, (_, folder) in zip(labels, names, runs, strict=True)
    ]


def number(value: Any) -> str:
    """A figure for a table."""
    if value is None:
        return "-"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{int(value):,}" if isinstance(value, int | float) else str(value)


def is_figure(cell: str) -> bool:
    """Whether a cell is a number, of which no line may hold a part."""
    return cell.replace(",", "").replace(".", "").lstrip("-").isdigit()


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a configuration."""
    if isinstance(tree, dict) and tree:
        return {key: value for name, part in tree.items() for key, value in flatten(part, f"{prefix}{name}.").items()}
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        return {k: v for i, part in enumerate(tree) for k, v in flatten(part, f"{prefix}{i}.").items()}
    return {prefix[:-1]: tree}


def key(index: int) -> str:
    """The line of run number `index` as a small picture."""
    return (
        '<svg class="key" viewBox="0 0 26 10" aria-hidden="true"><line x1="1" x2="25" y1="5" y2="5" stroke-width="3" '
        f'stroke="{colour(index)}" stroke-dasharray="{dash(index).replace("solid", "none").replace("px", "")}"/></svg>'
    )


def table(names: Sequence[str], rows: Sequence[Sequence[str]], *, corner: str = "", of_runs: bool = True) -> str:
    """An HTML table with a column for each run, or (of_runs off) of one run's own; cells are escaped here."""

    def cell(tag: str, place: int, text: str) -> str:
        of = f' data-run="{place}"' if of_runs else ""
        return f"<{tag}{of}{FIGURE if is_figure(text) else ''}>{html.escape(text)}</{tag}>"

    def line(tag: str, cells: Sequence[str]) -> str:
        rest = (cell(tag, place, text) for place, text in enumerate(cells[1:]))
        return f"<tr><{tag}>{html.escape(cells[0])}</{tag}>{''.join(rest)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="wide"><table>{line("th", [corner, *names])}{body}</table></div>'


def figures(runs: Sequence[RunRecords], wanted: Iterable[tuple[str, str, str]]) -> list[list[str]]:
    """Lines of a table with the newest figures; without those that no run has."""
    rows = [[title, *(number(run.last(kind, name)) for run in runs)] for title, kind, name in wanted]
    return [row for row in rows if any(cell != "-" for cell in row[1:])]


def differences(runs: Sequence[RunRecords]) -> list[list[str]]:
    """Keys of the configuration whose values are not the same in all runs."""
    flat = [flatten(run.config) for run in runs]
    values = {name: [str(tree.get(name, "-")) for tree in flat] for tree in flat for name in tree}
    values = {name: ["-" if value == "None" else value for value in cells] for name, cells in values.items()}
    return [[name, *values[name]] for name in sorted(values) if len(set(values[name])) > 1 and name not in NOT_COMPARED]


def sources(runs: Sequence[RunRecords], names: Sequence[str]) -> str:
    """What each source had of a run, a table for each run that has several; nothing where none has."""
    blocks = []
    for run, one in enumerate(runs):
        totals = source_totals(one.of_kind("train"))
        whole = sum(own["tokens"] or 0.0 for own in totals.values()) or 1.0
        shares: dict[str, Any] = {
            name: {**own, "share": (own["tokens"] or 0.0) / whole} for name, own in totals.items()
        }
        rows = [[title, *(number(own[figure]) for own in shares.values())] for title, figure in SOURCES]
        if totals:
            head = f"<h3>{key(run)}{html.escape(names[run])}</h3>"
            blocks.append(f'<div data-run="{run}">{head}{table(list(totals), rows, of_runs=False)}</div>')
    return f"<h2>Sources</h2>{''.join(blocks)}" if blocks else ""


def sample_text(sample: dict[str, Any]) -> str:
    """The text of a sample as a quotation; three dots where it was cut."""
    return f"<blockquote>{html.escape(sample['text'])}{'' if sample['ended'] else ' ...'}</blockquote>"


def samples(runs: Sequence[RunRecords], names: Sequence[str]) -> str:
    """Newest texts, by prompt and then by run, so that runs can be compared; earlier ones are folded away."""
    newest = {run: records[-1] for run, one in enumerate(runs) if (records := one.of_kind("sample"))}
    if not newest:
        return ""
    prompts = {(text["source"], text["prompt"]): None for record in newest.values() for text in record["samples"]}
    cards = []
    for source, prompt in prompts:
        texts = [
            f'<div data-run="{run}"><h3>{key(run)}{html.escape(names[run])} <small>step {record["step"]:,}</small></h3>'
            f"{sample_text(text)}</div>"
            for run, record in newest.items()
            for text in record["samples"]
            if (text["source"], text["prompt"]) == (source, prompt)
        ]
        head = f'<p class="prompt"><span class="note">{html.escape(source)}:</span> {html.escape(prompt)}</p>'
        cards.append(f'<div class="sample">{head}{"".join(texts)}</div>')
    return f"<h2>Samples of text</h2>{''.join(cards)}{earlier_samples(runs, names)}"


def earlier_samples(runs: Sequence[RunRecords], names: Sequence[str]) -> str:
    """A fold for each run with the texts of its evaluations before the last one, newest first."""
    folds = []
    for run, one in enumerate(runs):
        earlier = one.of_kind("sample")[-2::-1]
        texts = [
            f"<h3>step {record['step']:,} <small>{html.escape(text['prompt'])}</small></h3>{sample_text(text)}"
            for record in earlier
            for text in record["samples"]
        ]
        if texts:
            summary = f"<summary>{key(run)}Earlier samples of {html.escape(names[run])} ({len(earlier)})</summary>"
            folds.append(f'<details data-run="{run}">{summary}<div class="sample">{"".join(texts)}</div></details>')
    return "".join(folds)


def as_script(name: str, data: Any) -> str:
    """JSON inside the page, of which nothing can end the element that it stands in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def curves(charts: Sequence[dict[str, Any]]) -> str:
    """A place for each chart."""
    parts = "".join(
        f"<figure><figcaption>{html.escape(chart['title'])}</figcaption>"
        f'<div class="plot" id="chart-{place}" role="img" aria-label="{html.escape(chart["title"])}"></div></figure>'
        for place, chart in enumerate(charts)
    )
    return f'<noscript><p>The curves need JavaScript.</p></noscript><div class="charts">{parts}</div>'


def scripts(charts: Sequence[dict[str, Any]]) -> str:
    """The data of the charts, plotly and what the page does itself."""
    from plotly.offline import get_plotlyjs

    data = as_script("charts", charts) + as_script("axes", AXES)
    return f"{data}<script>{get_plotlyjs()}</script><script>{SCRIPT}</script>"


def bar(names: Sequence[str]) -> str:
    """The legend, which stays in sight, and the choice of the x axis."""
    buttons = "".join(
        f'<button type="button" class="run" aria-pressed="true" title="click: switch this run off or on; double click: '
        f'this run alone">{key(run)}{html.escape(name)}</button>'
        for run, name in enumerate(names)
    )
    options = "".join(f'<option value="{axis}">{title}</option>' for axis, title in AXES.items())
    return f'<div class="bar">{buttons}<label>over <select id="axis">{options}</select></label></div>'


def render(runs: Sequence[RunRecords]) -> str:
    """The page."""
    names = labels_of([(run.name, run.folder) for run in runs])
    runs = [
        RunRecords(name, run.folder, run.records, run.config, run.is_done)
        for name, run in zip(names, runs, strict=True)
    ]
    states = [["state", *(run.state for run in runs)], ["folder", *(str(run.folder) for run in runs)]]
    heldout, differing, charts = figures(runs, HELDOUT), differences(runs), draw_all(runs)
    title = html.escape(", ".join(names))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>potstill report: {title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>{bar(names)}"
        f"<h2>Held-out figures</h2>{table(names, heldout) if heldout else '<p>No evaluation yet.</p>'}"
        f"<h2>Curves</h2>{curves(charts)}{sources(runs, names)}{samples(runs, names)}"
        f"<h2>Runs</h2>{table(names, [*states, *figures(runs, TRAINING)])}<h2>Differences of configuration</h2>"
        f"{table(names, differing, corner='key') if differing else '<p>None.</p>'}{scripts(charts)}</body></html>\n"
    )


def write_report(folders: Sequence[Path], output: Path, *, force: bool = False) -> Path:
    """Write the page of these runs to `output`. Raises UserError."""
    if output.exists() and not force:
        raise UserError(f"{output} exists; name another file or use --force")
    runs = [read_run(folder) for folder in folders]
    if not any(run.records for run in runs):
        raise UserError(
            f"{', '.join(str(run.folder) for run in runs)}: no metrics yet; let a run reach its first line "
            "(logging.every_steps)"
        )
    write_whole(output, render(runs))
    return output
