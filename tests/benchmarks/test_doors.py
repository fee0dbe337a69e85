"""Benchmarks enter the command's room by its doors only, and import no name that begins with an underscore."""

from __future__ import annotations

import ast
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
# cli: the command itself; plan, calibrate, demo: what a benchmark is about; the others start work as the command does.
DOORS = {"cli", "plan", "calibrate", "presets", "ranks", "warm_server", "demo"}


def test_benchmarks_use_the_doors_of_launch() -> None:
    wrong = []
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("potstill"):
                continue
            parts = str(node.module).split(".")
            names = [alias.name for alias in node.names]
            room, door = parts[1] if len(parts) > 1 else "", parts[2] if len(parts) > 2 else names[0]
            if (room == "launch" and door not in DOORS) or any(name.startswith("_") for name in [*parts, *names]):
                wrong.append(f"{path.name}:{node.lineno} imports {names} of {node.module}")
    assert not wrong, "\n".join(wrong)
