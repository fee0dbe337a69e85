"""Runs kernel_battery.py against the kernels as they are and against each mutant of mutants.py; prints JSON lines.

A process of its own. torch and triton are imported once here, nothing of potstill is; each run is a child of this
process, which imports the kernels of a folder that has them as files of its own and all else linked to this checkout.
    python mutant_worker.py [NAME ..]     those whose name holds one of these; without any: all
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import importlib
import json
import runpy
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # potstill and triton import these, and each child would, for seconds
import triton.language

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
LIMIT_SECONDS = 240  # of one child


def load_mutants() -> list[Any]:
    """The table, of this checkout; each child then finds the name `tests` for itself."""
    sys.path.insert(0, str(ROOT))
    try:
        return list(importlib.import_module("tests.kernels.mutants").MUTANTS)
    finally:
        sys.path.remove(str(ROOT))
        for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
            del sys.modules[name]


def copy_of_package(folder: Path) -> Path:
    """A package potstill in `folder` whose kernels are files of its own."""
    copy = folder / "potstill"
    copy.mkdir()
    for entry in (ROOT / "src" / "potstill").iterdir():
        if entry.name == "kernels":
            shutil.copytree(entry, copy / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
        elif entry.name != "__pycache__":
            (copy / entry.name).symlink_to(entry.resolve())
    return copy


def battery_in_child(folder: Path, arguments: list[str]) -> tuple[int, dict[str, Any]]:
    """(exit status, < 0 for a signal; what the battery printed, or {}) against the package in `folder`."""
    printed = folder / "printed.json"
    child = os.fork()
    if child == 0:
        status = 99  # what does not come to the end of the battery
        try:
            signal.alarm(LIMIT_SECONDS)
            os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(os.open(folder / "errors.txt", os.O_WRONLY | os.O_CREAT), 2)
            sys.path[:0] = [str(folder), str(ROOT)]
            sys.argv = ["kernel_battery.py", *arguments]
            runpy.run_path(str(FOLDER / "kernel_battery.py"), run_name="__main__")
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = printed.read_text() if printed.exists() else ""
    return status, json.loads(text) if text.strip() else {}


def run(mutant: Any | None) -> dict[str, Any]:
    """The report on one mutant; None: on the kernels as they are."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        package = copy_of_package(folder)
        if mutant is not None:
            mutant.plant(package / "kernels")
        arguments = [] if mutant is None else ["--first", mutant.seen_by]
        status, found = battery_in_child(folder, arguments)
        errors = folder / "errors.txt"
        report = {
            "name": None if mutant is None else mutant.name,
            "status": status,
            "copy": str(package / "kernels"),
            **found,
            "errors": errors.read_text()[-2000:] if errors.exists() else "",
        }
    return {**report, "seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    torch.set_num_threads(1)
    assert triton.language is not None
    wanted = sys.argv[1:]
    every: list[Any | None] = [None, *load_mutants()]
    for mutant in every:
        if not wanted or (mutant is not None and any(part in mutant.name for part in wanted)):
            print(json.dumps(run(mutant)), flush=True)


if __name__ == "__main__":
    main()
