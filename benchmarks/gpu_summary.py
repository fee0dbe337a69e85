"""The summary of a run on one GPU: what ran on what, figures beside goals, every part; as Markdown and as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu_goals import GOALS, Figures, Goal
from benchmarks.gpu_parts import Part

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "deepspeed", "transformers", "liger-kernel")
SUMMARY, WHOLE = "summary.md", "summary.json"
HIDDEN = {"settings", "machine", "versions", "date", "stage_seconds", "losses", "about", "rows", "not_passed"}
State = Literal["waiting", "running", "done", "failed", "stopped", "not measured"]


@dataclass
class Outcome:
    """How a part stands: its figures as far as they are there, and why there are no more."""

    part: Part
    state: State = "waiting"
    seconds: float = 0.0
    bound: float | None = None
    figures: Figures | None = None
    note: str = ""

    @property
    def told(self) -> str:
        return f"{self.state}: {self.note}" if self.note else self.state


def commit() -> str:
    """What the file COMMIT in the root says (who copies a tree to a machine writes it there: git's own folder, if that
    comes along, may be of another day); else git's commit, with a plus where files were changed; else "unknown"."""
    written = ROOT / "COMMIT"
    if written.is_file():
        return written.read_text(encoding="utf-8").strip()
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
        return head + ("+" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def card_and_driver() -> tuple[str, str] | None:
    """Name of the first GPU and version of its driver, without starting torch; None where nvidia-smi knows of none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        name, driver = text.splitlines()[0].split(",")
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None
    return name.strip(), driver.strip()


def about(*, smoke: bool) -> dict[str, Any]:
    """Card, driver, versions, commit, date. torch is asked only where nvidia-smi does not answer."""
    found = None if smoke else card_and_driver()
    if found is None:
        found = (f"no GPU: smoke run on {os.cpu_count()} cores", "none")
        if not smoke:
            import torch

            found = (torch.cuda.get_device_name(), f"cuda {torch.version.cuda}, hip {torch.version.hip}")
    return {
        "card": found[0],
        "driver": found[1],
        "host": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


@dataclass
class Summary:
    """All that is known of a run, written anew whenever something changes; right at any moment."""

    output: Path
    about: dict[str, Any]
    outcomes: list[Outcome]
    minutes: float
    smoke: bool
    ending: str = "still running"
    spent: float = 0.0
    goals: Sequence[Goal] = field(default=GOALS)

    @property
    def card(self) -> str:
        return str(self.about["card"])

    def goal_rows(self) -> list[dict[str, Any]]:
        """Per goal: what, bound, measured (None where it is not), verdict."""
        by_name = {outcome.part.name: outcome for outcome in self.outcomes}
        return [self._goal_row(goal, by_name.get(goal.part)) for goal in self.goals]

    def _goal_row(self, goal: Goal, outcome: Outcome | None) -> dict[str, Any]:
        bound = goal.bound(self.card)
        row: dict[str, Any] = {"figure": goal.what, "goal": bound, "at_least": goal.at_least, "measured": None}
        if outcome is None:
            return {**row, "verdict": "not measured: no such part"}
        if not outcome.figures:
            return {**row, "verdict": f"not measured: {goal.part} {outcome.told}"}
        try:
            value = goal.value(outcome.figures)
        except LookupError as error:
            return {**row, "verdict": f"not measured: {error}"}
        verdict = "smoke: no meaning" if self.smoke else goal.verdict(value, self.card)
        if outcome.state != "done":
            verdict += f" ({goal.part} {outcome.state})"
        return {**row, "measured": value, "verdict": verdict}

    def as_json(self) -> dict[str, Any]:
        parts = {
            outcome.part.name: {
                "measures": outcome.part.measures,
                "state": outcome.state,
                "note": outcome.note,
                "seconds": round(outcome.seconds, 1),
                "bound_seconds": None if outcome.bound is None else round(outcome.bound, 1),
                "figures": outcome.figures,
            }
            for outcome in self.outcomes
        }
        head = {"about": self.about, "smoke": self.smoke, "minutes": self.minutes, "ending": self.ending}
        return {**head, "seconds": round(self.spent, 1), "goals": self.goal_rows(), "parts": parts}

    def last_line(self) -> str:
        """The run in one line of JSON."""
        goals = {row["figure"]: [row["measured"], row["verdict"]] for row in self.goal_rows()}
        states = {outcome.part.name: outcome.told for outcome in self.outcomes}
        head = {key: self.about[key] for key in ("card", "commit", "date")}
        return json.dumps(
            {**head, "ending": self.ending, "seconds": round(self.spent, 1), "parts": states, "goals": goals}
        )

    def ceilings(self) -> str:
        """What the card can do and what its host costs, as the kernels' part measured it; nothing before that."""
        for outcome in self.outcomes:
            found = (outcome.figures or {}).get("about")
            if found is not None and "host_us_per_tiny_op" in found:
                return (
                    f"\nA copy moves {found['copy_TB_per_second']} TB/s, a bf16 product runs at "
                    f"{found['product_TFLOP_per_second']} TFLOP/s, the host takes {found['host_us_per_tiny_op']} us "
                    "for an operation on one number (what a launch costs)."
                )
        return ""

    def as_markdown(self) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in self.about["versions"].items())
        bounds = [(row["figure"], bound_text(row), number(row["measured"]), row["verdict"]) for row in self.goal_rows()]
        parts = [
            (outcome.part.name, outcome.part.measures, outcome.told, number(outcome.seconds), number(outcome.bound))
            for outcome in self.outcomes
        ]
        blocks = [
            f"# {self.card}, {self.about['date']}",
            f"Commit {self.about['commit']}; driver {self.about['driver']}; {self.about['host']}; {versions}.\n"
            f"{self.minutes:g} minutes were given; after {self.spent:.0f} s: {self.ending}.{self.ceilings()}",
            "## Against the goals for this card",
            table(("figure", "goal", "measured", "verdict"), bounds),
            "## Parts",
            table(("part", "measures", "state", "seconds", "bound"), parts),
            *(details(outcome) for outcome in self.outcomes if outcome.figures),
        ]
        return "\n\n".join(blocks) + "\n"

    def write(self) -> None:
        """Both files, each whole at any moment."""
        for name, text in ((SUMMARY, self.as_markdown()), (WHOLE, json.dumps(self.as_json(), indent=1) + "\n")):
            part = self.output / f".{name}.part"
            part.write_text(text, encoding="utf-8")
            os.replace(part, self.output / name)


def bound_text(row: dict[str, Any]) -> str:
    if row["goal"] is None:
        return "none for this card"
    return f"{'>=' if row['at_least'] else '<='} {row['goal']:.4g}"


def number(value: Any) -> str:
    """A cell: four digits of a number, a dash for nothing."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


ROW_HEAD = ("what", "V", "D", "variant", "computes", "ms", "busy ms", "launches", "fraction", "MiB", "errors", "note")


def kernel_cells(row: dict[str, Any]) -> tuple[str, ...]:
    errors = "-" if row["error_kept"] is None else f"{row['error_kept']:.1e}, {row['error_rest']:.1e}"
    keys = ("milliseconds", "busy_ms", "launches", "fraction", "peak_mib")
    names = tuple(str(row[key]) for key in ("what", "vocabulary", "width", "variant", "computes"))
    return (*names, *(number(row[key]) for key in keys), errors, row["note"])


def details(outcome: Outcome) -> str:
    """All figures of a part: the kernels' table, or a line per figure."""
    figures = outcome.figures or {}
    lines = [f"## {outcome.part.name}: {outcome.part.measures}"]
    if "rows" in figures:
        lines.append(", ".join(f"{name} {value}" for name, value in figures["about"].items()))
        lines.append(table(ROW_HEAD, [kernel_cells(row) for row in figures["rows"]]))
        return "\n\n".join(lines)
    shown = [f"* {name}: {json.dumps(value)}" for name, value in figures.items() if name not in HIDDEN]
    shown += [f"* not passed: `{name}`" for name in figures.get("not_passed", [])]
    return "\n\n".join([*lines, "\n".join(shown)])
