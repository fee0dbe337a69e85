"""Run a list of command lines in the order of their needs, as many at a time as there are slots.

A job that says it is done is left out, so that the same list run again does only what is missing. Output of a job
goes to its log file; `show` gets the newest line of it now and then.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from potstill.common.errors import UserError
from potstill.common.processes import Child, passing_signals_to, stop
from potstill.common.progress import format_seconds

POLL_SECONDS = 0.1
LINE_EVERY_SECONDS = 10.0
TAIL_LINES = 15
_BEGAN = time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command line: when it may start (`needs`), how many slots it fills, and how to see that it is done.

    `marker` is a file to write when the command has ended with 0, for work that leaves no mark of its own.
    """

    name: str
    command: tuple[str, ...]
    is_done: Callable[[], bool]
    needs: tuple[str, ...] = ()
    slots: int = 1
    marker: Path | None = None


# Starts a command whose output goes to a file: (words after the program's name, log file) -> child.
Starter = Callable[[Sequence[str], Path], Child]


@dataclass
class _Running:
    job: Job
    process: Child
    began: float
    log: BinaryIO
    shown: float
    newest: str = ""


def shell_line(command: Sequence[str]) -> str:
    """The command as a person would type it."""
    return shlex.join(command)


class JobRunner:
    """Runs jobs as children of this process; `seconds` holds the wall time of each job that ran."""

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        starter: Starter,
        slots: int,
        log_folder: Path,
        show: Callable[[str], None],
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._jobs = list(jobs)
        self._starter = starter
        self._slots = slots
        self._log_folder = log_folder
        self._show = show
        self._finished: set[str] = set()
        self._running: list[_Running] = []

    def run(self) -> None:
        """Run all jobs that are not done. Raises UserError for the first that fails; the others are stopped."""
        self._log_folder.mkdir(parents=True, exist_ok=True)
        for job in self._jobs:
            if set(job.needs) <= self._finished and job.is_done():
                self._finished.add(job.name)
                self._show(f"{job.name}: done before")
        processes: list[Child] = []
        try:
            with passing_signals_to(processes) as received:
                while len(self._finished) < len(self._jobs):
                    if received:
                        raise KeyboardInterrupt
                    for job in self._ready():
                        self._start(job)
                        processes.append(self._running[-1].process)
                    time.sleep(POLL_SECONDS)
                    for running in list(self._running):
                        self._look_at(running)
                    processes[:] = [running.process for running in self._running]
        finally:
            for running in self._running:
                stop(running.process)
                running.log.close()

    def _ready(self) -> list[Job]:
        """Stages to start now: needs met, and room beside what runs (a wide one runs alone if it must)."""
        free = self._slots - sum(min(running.job.slots, self._slots) for running in self._running)
        started = self._finished | {running.job.name for running in self._running}
        ready = []
        for job in self._jobs:
            if job.name in started or not set(job.needs) <= self._finished:
                continue
            if min(job.slots, self._slots) > free:
                break  # keep the order: a wide job is not overtaken again and again by narrow ones behind it
            free -= min(job.slots, self._slots)
            ready.append(job)
        return ready

    def log_path(self, job: str) -> Path:
        """Where the output of a job is kept."""
        return self._log_folder / f"{job}.log"

    def _start(self, job: Job) -> None:
        self._show(f"{job.name}: $ {shell_line(job.command)}")
        path = self.log_path(job.name)
        path.touch()
        log = path.open("rb")
        log.seek(0, 2)  # an earlier, unfinished run has written before
        now = time.monotonic()
        self._running.append(_Running(job, self._starter(job.command[1:], path), now, log, shown=now))

    def _look_at(self, running: _Running) -> None:
        code = running.process.poll()
        lines = [line for line in running.log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        running.newest = lines[-1] if lines else running.newest
        if running.newest and time.monotonic() - running.shown >= LINE_EVERY_SECONDS:
            self._show(f"{running.job.name}: {running.newest}")
            running.newest, running.shown = "", time.monotonic()
        if code is None:
            return
        stop(running.process)
        running.log.close()
        self._running.remove(running)
        name, marker = running.job.name, running.job.marker
        if code == 0 and marker is not None:
            marker.touch()
        if code != 0 or not running.job.is_done():
            raise UserError(
                f"job {name} ended with code {code}{'' if code else ' but its output is not complete'}; "
                f"the end of {self.log_path(name)}:\n{self._tail(name)}\n"
                "fix the cause and repeat the command: it continues from here"
            )
        self.seconds[name] = time.monotonic() - running.began
        self._finished.add(name)
        self._show(f"{name}: done in {format_seconds(self.seconds[name])}")

    def _tail(self, name: str) -> str:
        with contextlib.suppress(OSError):
            lines = self.log_path(name).read_text(encoding="utf-8", errors="replace").splitlines()
            return "\n".join(f"  {line}" for line in lines[-TAIL_LINES:])
        return "  (no output)"


def say(line: str) -> None:
    """Print one line with the time since the start."""
    print(f"[{format_seconds(time.monotonic() - _BEGAN):>6}] {line}", flush=True)
