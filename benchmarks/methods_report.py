"""Figures and tables of the comparison of methods: mean, spread, paired differences, steps to the labels' loss."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Evaluations = list[list[dict[str, Any]]]  # by seed, in order of steps


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.deviation:.4f}"

    def signed(self) -> str:
        return f"{self.mean:+.4f} ± {self.deviation:.4f}"


@dataclass(frozen=True)
class PresetResult:
    """Held-out evaluations of the arms of one preset: `labels`, `kd` where there are targets, and the preset."""

    preset: str
    arms: dict[str, Evaluations]

    def final(self, arm: str, name: str) -> list[float]:
        """The last evaluation's figure, by seed."""
        return [float(records[-1][name]) for records in self.arms[arm]]

    def difference(self, other: str) -> list[float]:
        """Final held-out loss minus that of another arm, by seed: same initial weights, same order of rows."""
        pairs = zip(self.final(self.preset, "heldout_loss"), self.final(other, "heldout_loss"), strict=True)
        return [mine - theirs for mine, theirs in pairs]

    def steps_to_labels(self, arm: str) -> list[int | None]:
        """First evaluated step at or below the final loss of the label-only run of the seed; None: never."""
        goals = self.final("labels", "heldout_loss")
        return [
            next((record["step"] for record in records if record["heldout_loss"] <= goal), None)
            for records, goal in zip(self.arms[arm], goals, strict=True)
        ]

    def figures(self) -> dict[str, Any]:
        """Everything as plain values."""
        found: dict[str, Any] = {}
        for arm in self.arms:
            loss, error = (Spread.of(self.final(arm, name)) for name in ("heldout_loss", "calibration_error"))
            found[arm] = {
                "heldout_loss": {"mean": round(loss.mean, 4), "spread": round(loss.deviation, 4)},
                "calibration_error": {"mean": round(error.mean, 4), "spread": round(error.deviation, 4)},
                "steps_to_labels": self.steps_to_labels(arm),
            }
        for other in ("labels", "kd"):
            if other in self.arms:
                found[f"minus_{other}"] = [round(value, 4) for value in self.difference(other)]
        return found


def verdict(differences: Sequence[float]) -> str:
    """`better` or `worse` where all seeds agree and the mean is beyond two standard errors, else `no difference`."""
    if len(differences) < 2:
        return "one seed"
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    mean = statistics.mean(differences)
    agree = all(value < 0 for value in differences) or all(value > 0 for value in differences)
    if not agree or abs(mean) <= 2 * error:
        return "no difference"
    return "better" if mean < 0 else "worse"


def _steps(values: Sequence[int | None]) -> str:
    return "/".join("never" if value is None else str(value) for value in values)


def _mean_or_dash(result: PresetResult, arm: str, name: str) -> str:
    return str(Spread.of(result.final(arm, name))) if arm in result.arms else "-"


def table(results: Sequence[PresetResult]) -> str:
    """Markdown: one line a preset."""
    lines = [
        "| preset | seeds | labels | plain KD | preset | preset − KD | beside KD | preset − labels | beside labels "
        "| steps to labels: KD | preset |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        loss = [_mean_or_dash(result, arm, "heldout_loss") for arm in ("labels", "kd", result.preset)]
        kd = ["-", "-"]
        if "kd" in result.arms:
            kd = [Spread.of(result.difference("kd")).signed(), verdict(result.difference("kd"))]
        labels = [Spread.of(result.difference("labels")).signed(), verdict(result.difference("labels"))]
        steps = [_steps(result.steps_to_labels(arm)) if arm in result.arms else "-" for arm in ("kd", result.preset)]
        seeds = str(len(result.arms[result.preset]))
        lines.append("| " + " | ".join([result.preset, seeds, *loss, *kd, *labels, *steps]) + " |")
    lines += ["", "Calibration error (ECE) on the held-out rows:", "", "| preset | labels | plain KD | preset |"]
    lines.append("|---|---|---|---|")
    for result in results:
        errors = [_mean_or_dash(result, arm, "calibration_error") for arm in ("labels", "kd", result.preset)]
        lines.append("| " + " | ".join([result.preset, *errors]) + " |")
    return "\n".join(lines)


def _listed(results: Sequence[PresetResult], other: str, words: str) -> list[str]:
    found = {word: [] for word in ("better", "no difference", "worse", "one seed")}  # type: dict[str, list[str]]
    for result in results:
        if other in result.arms:
            found[verdict(result.difference(other))].append(result.preset)
    joined = {"no difference": "no difference from", "one seed": "one seed beside"}
    return [
        f"- {joined.get(word, f'{word} than')} {words}: {', '.join(names)}" for word, names in found.items() if names
    ]


@dataclass(frozen=True)
class Table:
    """The results of one comparison, and how long its runs were."""

    title: str
    results: Sequence[PresetResult]
    steps: int
    batch_rows: int

    def format(self) -> str:
        return table(self.results)

    def section(self) -> list[str]:
        """Lines of Markdown: heading, tables, and what helped."""
        return [
            f"## {self.title}",
            "",
            f"{self.steps} steps of {self.batch_rows} rows x 256 tokens.",
            "",
            self.format(),
            "",
            *_listed(self.results, "kd", "plain KD of the same targets"),
            "",
            *_listed(self.results, "labels", "labels alone"),
            "",
        ]


def write_report(path: Path, tables: Sequence[Table], *, seeds: int) -> None:
    """The tables with what was run and what did not help, as Markdown."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed", "transformers")
    )
    notes = path.with_suffix(".notes.md")
    steps = " --trained-steps ".join(str(made.steps) for made in tables)
    text = [
        "# Every preset beside label-only training and plain KD, on real text",
        "",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()} CPU, {versions}. Not measured on a GPU.",
        "",
        f"    python -m benchmarks.methods --all --data ../shared/data --work FOLDER --steps {steps} --seeds {seeds} "
        f"--output {path}",
        "",
        "Held-out loss in nats per token, mean ± standard deviation over the finished seeds, whose number stands "
        "beside the preset. Differences are taken seed by seed: the arms of a seed share initial weights and the order "
        "of rows. `better` and `worse`: all seeds agree and the mean lies beyond two standard errors; with three seeds "
        "that is a hint, not a proof.",
        "",
        *(line for made in tables for line in made.section()),
    ]
    if notes.is_file():
        text.append(notes.read_text(encoding="utf-8").rstrip() + "\n")
    path.write_text("\n".join(text), encoding="utf-8")
