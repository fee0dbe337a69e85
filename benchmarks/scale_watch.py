"""Start the steps of scale_steps in processes of their own, and watch what memory they take with all they start."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.1


@dataclass(frozen=True)
class Watched:
    """Figures of each process in their order, and megabytes of all together beyond what they had when ready."""

    figures: list[dict[str, Any]]
    peak_mb: float
    kept_mb: float


class Step:
    """One process of a step: started, ready, at work, held until it is let go."""

    def __init__(self, name: str, options: dict[str, Any], environment: dict[str, str], log: Path) -> None:
        self._name, self._log = name, log
        begin = "from benchmarks.scale_steps import main; main()"
        command = [sys.executable, "-c", begin, name, json.dumps(options)]
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )

    def begin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def line(self, seconds: float) -> dict[str, Any] | None:
        """The next line of JSON, None if there is none within so many seconds. Raises RuntimeError at its end."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return None
        text = self.process.stdout.readline()
        if not text.startswith(b"{"):
            if text:
                return self.line(seconds)  # what a library printed
            raise RuntimeError(
                f"step {self._name} ended with code {self.process.wait()}; the end of {self._log}:\n"
                + self._log.read_text(errors="replace")[-3000:]
            )
        found: dict[str, Any] = json.loads(text)
        return found

    def end(self) -> None:
        """End it and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def tree(root: int) -> list[int]:
    """A process and all below it."""
    found = [root]
    for pid in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def proportional_bytes(pid: int) -> int:
    """Memory of a process, shared pages divided among those that share them; 0 of one that has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0


def node_bytes(roots: Sequence[int]) -> int:
    """Memory of these processes and all below them."""
    return sum(proportional_bytes(pid) for root in roots for pid in tree(root))


def watch(
    name: str, each: Sequence[dict[str, Any]], *, environment: dict[str, str], log: Path, timeout_seconds: float
) -> Watched:
    """Run the step `name` once for each set of options, all at the same time. Raises RuntimeError where one fails."""
    steps = [Step(name, options, environment, log) for options in each]
    deadline = time.monotonic() + timeout_seconds
    try:
        for step in steps:
            while step.line(1.0) is None:
                _check_time(deadline, name, timeout_seconds)
        roots = [step.process.pid for step in steps]
        base = node_bytes(roots)
        for step in steps:
            step.begin()
        peak, found = base, dict[int, dict[str, Any]]()
        while len(found) < len(steps):
            peak = max(peak, node_bytes(roots))
            _check_time(deadline, name, timeout_seconds)
            for number, step in enumerate(steps):
                figures = None if number in found else step.line(SAMPLE_SECONDS / len(steps))
                if figures is not None:
                    found[number] = figures
        kept = node_bytes(roots)
        own_peaks = sum(figures.get("own_peak_bytes", 0) for figures in found.values()) if len(steps) == 1 else 0
        peak = max(peak, kept, base + own_peaks)
        return Watched([found[number] for number in range(len(steps))], (peak - base) / 1e6, (kept - base) / 1e6)
    finally:
        for step in steps:
            step.end()


def _check_time(deadline: float, name: str, seconds: float) -> None:
    if time.monotonic() > deadline:
        raise RuntimeError(f"step {name} took longer than {seconds:.0f} s (--step-minutes)")
