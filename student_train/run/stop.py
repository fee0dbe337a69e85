"""Reasons to stop early: a signal, a deadline, a stop file, an engine. Asked once per step, agreed by all ranks."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from potstill.common.errors import UserError
from potstill.storage import give_up_reads

STOP_FILE = "stop"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StoppedByFileError(UserError):
    """Somebody asked for a stop by a file in the run folder, and it is still there."""


def refuse_if_stopped(run: Path) -> None:
    """Raises StoppedByFileError while the stop file stands, also after the run has obeyed it.

    Only a person takes the wish back: schedulers start a job again by themselves, and a start that took the file away
    would train on against that wish.
    """
    path = run / STOP_FILE
    if path.exists():
        raise StoppedByFileError(
            f"{path} asks this run to stop, and a start does not overrule it; delete the file to continue: rm {path}"
        )


class StopRequest:
    """A context in which signals only leave a note; `reason()` reads it together with the clock and the stop file.

    `ask` gives the reason of whoever runs the trainer in a thread, where no signal arrives.

    A step that waits for a read that hangs would not come to its end: that read ends with StoppedReadError then.
    """

    def __init__(
        self, run: Path, *, max_runtime_minutes: float | None, ask: Callable[[], str | None] = lambda: None
    ) -> None:
        self._run, self._ask = run, ask
        self._deadline = None if max_runtime_minutes is None else time.monotonic() + 60.0 * max_runtime_minutes
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        give_up_reads(signal.Signals(number).name)

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread (a notebook, a server): the other two reasons still work
                break
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        give_up_reads(None)

    def reason(self) -> str | None:
        """Why this rank wants to stop, or None."""
        if self._signal is not None:
            return f"signal {signal.Signals(self._signal).name}"
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "run.max_runtime_minutes"
        if (self._run / STOP_FILE).exists():
            return f"stop file {self._run / STOP_FILE}"
        return self._ask()
