"""Run a list of command lines in the order of their needs, as many at a time as there are slots.

A stage that says it is done is left out, so that the same list run again does only what is missing. Output of a stage
goes line by line to its log file and, marked with its name, to `show`.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from potstill.common.errors import UserError
from potstill.launch.processes import passing_signals_to, start, stop

POLL_SECONDS = 0.1
TAIL_LINES = 15


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command line: when it may start (`needs`), how many slots it fills, and how to see that it is done."""

    name: str
    command: tuple[str, ...]
    is_done: Callable[[], bool]
    needs: tuple[str, ...] = ()
    slots: int = 1


@dataclass
class _Running:
    stage: Stage
    process: subprocess.Popen[bytes]
    began: float
    reader: threading.Thread


def shell_line(command: Sequence[str]) -> str:
    """The command as a person would type it."""
    return shlex.join(command)


class StageRunner:
    """Runs stages as children of this process; `seconds` holds the wall time of each stage that ran."""

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        prefix: Sequence[str],
        slots: int,
        log_folder: Path,
        show: Callable[[str], None],
        environment: dict[str, str] | None = None,
    ) -> None:
        """`prefix` is put before each command (the interpreter and its module)."""
        self.seconds: dict[str, float] = {}
        self._stages = list(stages)
        self._prefix = list(prefix)
        self._slots = slots
        self._log_folder = log_folder
        self._show = show
        self._environment = environment
        self._finished: set[str] = set()
        self._running: list[_Running] = []

    def run(self) -> None:
        """Run all stages that are not done. Raises UserError for the first that fails; the others are stopped."""
        self._log_folder.mkdir(parents=True, exist_ok=True)
        for stage in self._stages:
            if set(stage.needs) <= self._finished and stage.is_done():
                self._finished.add(stage.name)
                self._show(f"{stage.name}: done before")
        processes: list[subprocess.Popen[bytes]] = []
        try:
            with passing_signals_to(processes) as received:
                while len(self._finished) < len(self._stages):
                    if received:
                        raise KeyboardInterrupt
                    for stage in self._ready():
                        self._start(stage)
                        processes.append(self._running[-1].process)
                    time.sleep(POLL_SECONDS)
                    self._collect()
        finally:
            for running in self._running:
                stop(running.process)
                running.reader.join()

    def _ready(self) -> list[Stage]:
        """Stages to start now: needs met, and room beside what runs (a wide one runs alone if it must)."""
        free = self._slots - sum(min(running.stage.slots, self._slots) for running in self._running)
        started = self._finished | {running.stage.name for running in self._running}
        ready = []
        for stage in self._stages:
            if stage.name in started or not set(stage.needs) <= self._finished:
                continue
            if min(stage.slots, self._slots) > free:
                break  # keep the order: a wide stage is not overtaken for ever by narrow ones behind it
            free -= min(stage.slots, self._slots)
            ready.append(stage)
        return ready

    def _start(self, stage: Stage) -> None:
        self._show(f"{stage.name}: $ {shell_line(stage.command)}")
        process = start([*self._prefix, *stage.command[1:]], environment=self._environment, capture=True)
        reader = threading.Thread(target=self._read, args=(stage, process), daemon=True)
        reader.start()
        self._running.append(_Running(stage, process, time.monotonic(), reader))

    def log_path(self, stage: str) -> Path:
        """Where the output of a stage is kept."""
        return self._log_folder / f"{stage}.log"

    def _read(self, stage: Stage, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with self.log_path(stage.name).open("ab") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                self._show(f"{stage.name}: {line.decode('utf-8', 'replace').rstrip()}")

    def _collect(self) -> None:
        for running in list(self._running):
            code = running.process.poll()
            if code is None:
                continue
            stop(running.process)
            running.reader.join()
            self._running.remove(running)
            name = running.stage.name
            if code != 0 or not running.stage.is_done():
                raise UserError(
                    f"stage {name} ended with code {code}{'' if code else ' but its output is not complete'}; "
                    f"the end of {self.log_path(name)}:\n{self._tail(name)}\n"
                    "mend the cause and repeat the command: it goes on from here"
                )
            self.seconds[name] = time.monotonic() - running.began
            self._finished.add(name)
            self._show(f"{name}: done in {self.seconds[name]:.1f}s")

    def _tail(self, name: str) -> str:
        with contextlib.suppress(OSError):
            lines = self.log_path(name).read_text(encoding="utf-8", errors="replace").splitlines()
            return "\n".join(f"  {line}" for line in lines[-TAIL_LINES:])
        return "  (no output)"
