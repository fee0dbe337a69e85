"""What is kept of the claims: claims.json, claims.md made of it, and the plots.

A claim that is run alone replaces its own part.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.about import about
from benchmarks.claims.base import COUNTED, Bench, Claim, Finding, Outcome, Table
from benchmarks.claims.runs import Runs
from benchmarks.claims.svg import draw
from benchmarks.claims.table import CLAIMS, head
from potstill.common.text_tables import table


def finding_line(finding: Finding) -> str:
    """One finding as a line of text."""
    number = f"{_effect(finding.effect, finding.unit)} {finding.unit}"
    parts = [f"{'pass' if finding.passed else 'FAIL' if finding.rule else 'no'}: {finding.text}: {number}"]
    if finding.interval is not None:
        parts.append(f"95 % interval {finding.interval[0]:+.4f} to {finding.interval[1]:+.4f}")
    if finding.standardised is not None:
        parts.append(f"d {finding.standardised:+.1f}")
    return ", ".join(parts) + ("" if finding.rule else " (beside the rule)")


def _effect(effect: float, unit: str) -> str:
    return f"{effect:.0f}" if unit in COUNTED else f"{effect:+.4f}"


def table_text(found: Table) -> str:
    """Title and table as plain text."""
    return f"{found.title}\n{table(found.header, found.rows)}"


def result_of(claim: Claim, bench: Bench, runs: Runs, outcome: Outcome) -> dict[str, Any]:
    """Everything of an outcome as plain values."""
    rules = [finding for finding in outcome.findings if finding.rule]
    command = f"python -m benchmarks.claims --claim {claim.name} --seeds {','.join(map(str, bench.seeds))}"
    return {
        "pass": outcome.passed,
        "title": claim.title,
        "effect": rules[0].effect,
        "unit": rules[0].unit,
        "interval": rules[0].interval,
        "headline": rules[0].text,
        "seeds": list(bench.seeds),
        "scale": bench.scale,
        "command": command + ("" if bench.scale == "cpu" else f" --scale {bench.scale}"),
        **about(),
        "made_with": runs.made_with(),
        "findings": [vars(finding) for finding in outcome.findings],
        "tables": [vars(found) for found in outcome.tables],
        "plots": [f"claims/{claim.name}_{plot.name}.svg" for plot in outcome.plots],
        "notes": list(outcome.notes),
    }


def result_text(claim: Claim, outcome: Outcome) -> str:
    """The outcome for a terminal."""
    lines = [f"{claim.name}: {claim.title}: {'PASS' if outcome.passed else 'FAIL'}", ""]
    lines += [finding_line(finding) for finding in outcome.findings]
    for found in outcome.tables:
        lines += ["", table_text(found)]
    return "\n".join([*lines, "", *outcome.notes])


def keep(folder: Path, claim: Claim, result: dict[str, Any], outcome: Outcome) -> None:
    """Put the result into FOLDER/claims.json, write the Markdown of all results and this claim's plots."""
    path = folder / "claims.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kept[claim.name] = result
    ordered = {name: kept[name] for name in CLAIMS if name in kept}
    path.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    (folder / "claims").mkdir(exist_ok=True)
    for plot in outcome.plots:
        (folder / "claims" / f"{claim.name}_{plot.name}.svg").write_text(draw(plot), encoding="utf-8")
    (folder / "claims.md").write_text(markdown(ordered), encoding="utf-8")


def markdown(results: dict[str, Any]) -> str:
    """All results as one page: first the list, then each claim with the head of its file."""
    lines = [
        "# The claims",
        "",
        "Made by `python -m benchmarks.claims`; the figures are those of `claims.json`. Differences are paired by "
        "seed, intervals are 95 % of the mean by Student's t, d is the mean difference over its standard deviation.",
        "",
        "| claim | holds | headline | effect | 95 % interval | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        lines.append(
            f"| [{name}](#{name}) | {'yes' if result['pass'] else 'no'} | {result['headline']} | " + row_end(result)
        )
    for name, result in results.items():
        lines += ["", f"## {name}", "", f"**{'Holds' if result['pass'] else 'Does not hold'}**: {result['title']}", ""]
        lines += ["```text", head(name), "```", ""]
        lines += [f"    {result['command']}", "", _about_line(result), ""]
        lines += [f"- {finding_line(Finding(**finding))}" for finding in result["findings"]]
        for found in result["tables"]:
            lines += ["", "```text", table_text(Table(**found)), "```"]
        lines += [text for note in result["notes"] for text in ("", note)]
        lines += [text for plot in result["plots"] for text in ("", f"![{plot}]({plot})")]
    return "\n".join([*lines, ""])


def row_end(result: dict[str, Any]) -> str:
    """Effect, interval and number of seeds as the last cells of a Markdown row."""
    interval = "-" if result["interval"] is None else "{:+.4f} to {:+.4f}".format(*result["interval"])
    return f"{_effect(result['effect'], result['unit'])} {result['unit']} | {interval} | {len(result['seeds'])} |"


def _about_line(result: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    commits = ", ".join(sorted({made.get("commit", "unknown") for made in result["made_with"]}))
    return f"{result['date']}, commit {result['commit']} (runs: {commits}), {result['machine']}, {packages}."
