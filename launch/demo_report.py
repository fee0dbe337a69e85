"""The table that the demo ends with, read from the files that its stages have written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill.common.progress import format_seconds
from potstill.launch.stages import shell_line
from potstill.launch.text import format_bytes, table

MODELS = ("teacher", "slm", "labels-only", "distilled")


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def report(root: Path, times: Mapping[str, float]) -> str:
    """One table of the models, one line of the store, one table of times, and what to do next."""
    return "\n\n".join([models_table(root), verdict(root), store_line(root), times_table(times), next_steps(root)])


def models_table(root: Path) -> str:
    """A line for each model: size, training, and its figures on the same held-out rows."""
    rows = []
    for name in MODELS:
        figures, done = _json(root / "eval" / f"{name}.json"), _json(root / "runs" / name / "done.json")
        agreement = figures["agreement"]
        rows.append(
            (
                name,
                f"{figures['num_parameters']:,}",
                f"{done['step']:,}",
                f"{done['tokens']:,}",
                f"{figures['heldout_loss']:.4f}",
                f"{figures['perplexity']:.2f}",
                "-" if name == "teacher" or agreement is None else f"{100 * agreement:.1f} %",
            )
        )
    header = ["model", "parameters", "steps", "tokens", "held-out loss", "perplexity", "agrees with teacher"]
    return table(header, rows)


def verdict(root: Path) -> str:
    """Who is ahead on held-out loss, and by how much, as it came out."""
    labels = _json(root / "eval" / "labels-only.json")["heldout_loss"]
    distilled = _json(root / "eval" / "distilled.json")["heldout_loss"]
    word = "ahead of" if distilled < labels else "BEHIND"
    return (
        f"The distilled student is {abs(labels - distilled):.4f} nats {word} the one that saw labels only "
        "(held-out loss; same initial weights, seed of the order and number of steps; only in its first stage does the "
        "selector choose the distilled student's rows). One seed: another may give another distance."
    )


def store_line(root: Path) -> str:
    """What a token costs in the targets store."""
    manifest = _json(root / "targets" / "train" / "manifest.json")
    num_bytes, tokens = manifest["num_bytes"], manifest["num_tokens"]
    entries = manifest["num_entries"] / max(manifest["num_targets"], 1)
    return (
        f"Targets store: {format_bytes(num_bytes)} for {tokens:,} tokens, {num_bytes / tokens:.1f} bytes/token, "
        f"{entries:.1f} entries kept per target on average."
    )


def times_table(times: Mapping[str, float]) -> str:
    """Wall time of each stage that ever ran here; stages overlap, so their sum is more than the whole."""
    return table(["stage", "wall time"], [(name, format_seconds(seconds)) for name, seconds in times.items()])


def next_steps(root: Path) -> str:
    """Where things are, and commands to go on with."""
    row = ["--row", "0", "--tokens", f"{root}/data/train", "--tokenizer", f"{root}/data/tokenizer"]
    other = ["--set", f"run.output_dir={root}/runs/mine", "objective.alpha=0.5"]
    commands = [
        ["inspect", f"{root}/targets/train", *row],
        ["stats", f"{root}/targets/train"],
        ["verify", f"{root}/targets/train", "--deep"],
        ["train", "--config", f"{root}/configs/distilled.yaml", *other],
        ["report", f"{root}/runs/labels-only", f"{root}/runs/distilled", "--output", f"{root}/report.html"],
    ]
    return "\n".join(
        [
            f"Files are in {root}: data/ targets/ scores/ (stores), configs/, runs/ (metrics, checkpoints), "
            "models/ (Hugging Face), logs/",
            "Go on with:",
            *(f"  {shell_line(['potstill', *words])}" for words in commands),
        ]
    )
