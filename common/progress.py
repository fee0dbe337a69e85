"""Progress with rate and time left: a bar on a terminal, a plain line every few seconds in a log file."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

LINE_EVERY_SECONDS = 10.0


def format_seconds(seconds: float) -> str:
    """Write a duration as `1h02m`, `3m05s` or `7.2s`."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"
    if seconds >= 60:
        return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"
    return f"{seconds:.1f}s"


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at `stream` and it can move its cursor: only then is anything drawn again in place."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


class Progress:
    """Count work done towards `total` (None when it is not known) and tell a person how it goes.

    `done` of it was there before this process began: it counts, but rate and time left come from what is counted
    here. Use as a context manager; `update(n)` counts, `note(loss=3.2)` shows figures beside the count. Writes to
    `stream` (standard error by default) only. `enabled=False` makes it silent. On a terminal the bar is drawn by a
    thread of rich, and log records written through `sys.stderr` appear above it.
    """

    def __init__(
        self,
        total: int | None,
        *,
        done: int = 0,
        unit: str = "rows",
        description: str = "",
        enabled: bool = True,
        stream: TextIO | None = None,
        line_every_seconds: float = LINE_EVERY_SECONDS,
    ) -> None:
        self.total = total
        self.done = self._done_before = done
        self._unit = unit
        self._description = description
        self._enabled = enabled
        self._stream = stream if stream is not None else sys.stderr
        self._line_every_seconds = line_every_seconds
        self._figures: dict[str, str] = {}
        self._bar: Bar | None = None
        self._start = self._last_line = time.monotonic()
        self._last_written = ""

    def __enter__(self) -> Self:
        if self._enabled and is_terminal(self._stream):
            self._bar = self._make_bar()
            try:
                self._bar.start()
            except BaseException:  # Ctrl-C during the first drawing: rich would leave the cursor hidden
                self._bar.stop()
                raise
        return self

    def _make_bar(self) -> Bar:
        """A bar with `count unit, rate, time taken < time left, figures`; imports rich."""
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=Console(file=self._stream),
            refresh_per_second=4,
            redirect_stdout=False,  # a command may have sent it to a log file, and what goes there stays there
        )
        bar.add_task(self._description, total=self.total, completed=self.done, count=self._count(), figures="")
        return bar

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._enabled and error is None:
            self._write()

    def note(self, **figures: object) -> None:
        """Show these figures beside the count from now on."""
        self._figures.update(
            {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in figures.items()}
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], figures=self._told().strip())

    def update(self, count: int = 1) -> None:
        """Count `count` more as done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, count=self._count())
        elif self._enabled and time.monotonic() - self._last_line >= self._line_every_seconds:
            self._write()

    def line(self) -> str:
        """Say in one line: what, how much of how much, rate, time left or taken, figures."""
        if self.total is not None and self._done_before < self.done < self.total:
            clock = f"ETA {format_seconds((self.total - self.done) / self._rate())}"
        else:
            clock = f"in {format_seconds(self._seconds())}"
        return f"{self._description}: {self._count()}, {clock}{self._told()}"

    def _write(self) -> None:
        """Write the line, unless nothing was counted since the last one."""
        state = f"{self.done}{self._told()}"
        if state != self._last_written:
            self._stream.write(self.line() + "\n")
            self._stream.flush()
        self._last_line, self._last_written = time.monotonic(), state

    def _seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    def _rate(self) -> float:
        """Units per second of this process."""
        return (self.done - self._done_before) / self._seconds()

    def _count(self) -> str:
        share = f"{self.done}/{self.total}" if self.total is not None else str(self.done)
        return f"{share} {self._unit}, {self._rate():,.1f} {self._unit}/s"

    def _told(self) -> str:
        return "".join(f" {name}={value}" for name, value in self._figures.items())
