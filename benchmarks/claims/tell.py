"""README and docs/methods.md say what claims.json holds: parts of them between two marks are written from it.

<!-- claims -->             the table of all claims
<!-- claim: NAME -->        verdict, headline, command and plots of one
<!-- end -->
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from benchmarks.claims.base import Finding
from benchmarks.claims.report import finding_line, row_end

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "claims.json"
PAGES = (ROOT / "README.md", ROOT / "docs" / "methods.md")
PART = re.compile(r"(<!-- (?:claims|claim: (?P<name>\w+)) -->\n).*?(<!-- end -->)", re.DOTALL)


def _table(results: dict[str, Any], page: Path) -> str:
    if not results:
        return "Not run yet: no figure is told.\n"
    place = os.path.relpath(RESULTS.with_suffix(".md"), page.parent)
    lines = ["| what the paper says, at this scale | holds | measured | effect | 95 % interval | seeds |"]
    lines.append("|---|---|---|---|---|---|")
    for name, result in results.items():
        holds = "yes" if result["pass"] else "no"
        lines.append(f"| [{result['title']}]({place}#{name}) | {holds} | {result['headline']} | {row_end(result)}")
    return "\n".join([*lines, ""])


def _one(name: str, results: dict[str, Any], page: Path) -> str:
    if name not in results:
        return "Not run yet: no figure is told.\n"
    result = results[name]
    folder = os.path.relpath(RESULTS.parent, page.parent)
    lines = [f"**{'Holds' if result['pass'] else 'Does not hold'} at this scale**: {result['title']}.", ""]
    lines += [f"- {finding_line(Finding(**finding))}" for finding in result["findings"] if finding["rule"]]
    lines += ["", "```sh", result["command"], "```"]
    lines += [text for plot in result["plots"] for text in ("", f"![{name}]({folder}/{plot})")]
    return "\n".join([*lines, ""])


def told(page: Path, results: dict[str, Any]) -> str:
    """The page with its parts written anew."""

    def part(found: re.Match[str]) -> str:
        name = found["name"]
        return found[1] + (_table(results, page) if name is None else _one(name, results, page)) + found[3]

    return PART.sub(part, page.read_text(encoding="utf-8"))


def tell() -> list[Path]:
    """Write the parts of all pages anew; returns the pages that changed."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    changed = []
    for page in PAGES:
        text = told(page, results)
        if text != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")
            changed.append(page)
    return changed
