"""The steps that benchmarks/scale.py measures, each in a fresh process that the benchmark starts and watches.

A step gets ready (imports, a first run over a tiny store), says so, waits for a line, does the work that is measured,
prints its figures as one line of JSON and waits for another line, so that what it keeps can be looked at.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from potstill.common.processes import die_with_parent
from potstill.storage import seal_store, store_status

Options = dict[str, Any]
Figures = dict[str, Any]


def clocks() -> tuple[float, float]:
    """Seconds by the clock, and those that processors spent on this process and on those that it waited for."""
    spent = os.times()
    return time.perf_counter(), spent.user + spent.system + spent.children_user + spent.children_system


def spent(name: str, began: tuple[float, float], ended: tuple[float, float]) -> Figures:
    """Both between two moments: `name_s` and `name_cpu_s`."""
    return {f"{name}_s": ended[0] - began[0], f"{name}_cpu_s": ended[1] - began[1]}


def ready_status(options: Options) -> Callable[[], Figures]:
    def status() -> Figures:
        began = clocks()
        found = store_status(f"{options['place']}/targets")
        ended = clocks()
        if found.committed != options["num_units"] - 1:
            raise RuntimeError(f"{found.committed} units are committed, expected {options['num_units'] - 1}")
        return {"figures": spent("status", began, ended)}

    return status


def ready_seal(options: Options) -> Callable[[], Figures]:
    def seal() -> Figures:
        began = clocks()
        manifest = seal_store(f"{options['place']}/targets", fast=True)
        ended = clocks()
        if len(manifest.units) != options["num_units"]:
            raise RuntimeError(f"{len(manifest.units)} units are sealed, expected {options['num_units']}")
        return {"figures": spent("seal", began, ended) | {"index_mb": manifest.index_bytes / 1e6}}

    return seal


def ready_rank(name: str) -> Callable[[Options], Callable[[], Figures]]:
    """A step of scale_rank_steps, which needs torch and more."""

    def ready(options: Options) -> Callable[[], Figures]:
        from benchmarks.scale_rank_steps import RANK_STEPS

        return RANK_STEPS[name](options)

    return ready


STEPS: dict[str, Callable[[Options], Callable[[], Figures]]] = {
    "worker": ready_rank("worker"),
    "status": ready_status,
    "seal": ready_seal,
    "student": ready_rank("student"),
    "rows": ready_rank("rows"),
}


def resident(field: str) -> int:
    """Memory of this process by a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def reset_peak() -> int:
    """Begin to watch this process's own peak, which is over too quickly for one who looks now and then."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def main() -> None:
    """One step: its name and its options as JSON are the arguments."""
    die_with_parent()
    logging.basicConfig(level=logging.WARNING)
    step = STEPS[sys.argv[1]](json.loads(sys.argv[2]))
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()
    before = reset_peak()
    figures = step()
    print(json.dumps({**figures, "own_peak_bytes": resident("VmHWM") - before}), flush=True)
    sys.stdin.readline()
    os._exit(0)  # threads of loaders that read ahead are not waited for
