"""Progress with rate and time left: a bar on a terminal, a plain line every few seconds in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

LINE_EVERY_SECONDS = 10.0


def format_seconds(seconds: float) -> str:
    """Write a duration as `1h02m`, `3m05s` or `7.2s`."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"
    if seconds >= 60:
        return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"
    return f"{seconds:.1f}s"


class Progress:
    """Count work done towards `total` (None when it is not known) and tell a person how it goes.

    Use as a context manager; `update(n)` counts, `note(loss=3.2)` shows figures beside the count. Writes to `stream`
    (standard error by default) only, and never from another thread. `enabled=False` makes it silent.
    """

    def __init__(
        self,
        total: int | None,
        *,
        unit: str = "rows",
        description: str = "",
        enabled: bool = True,
        stream: TextIO | None = None,
        line_every_seconds: float = LINE_EVERY_SECONDS,
    ) -> None:
        self.total = total
        self.done = 0
        self._unit = unit
        self._description = description
        self._enabled = enabled
        self._stream = stream if stream is not None else sys.stderr
        self._line_every_seconds = line_every_seconds
        self._figures: dict[str, str] = {}
        self._bar: tqdm[Any] | None = None
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self._enabled and self._stream.isatty():
            self._bar = tqdm(
                total=self.total,
                unit=f" {self._unit}",
                desc=self._description,
                file=self._stream,
                dynamic_ncols=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._enabled and error is None:
            self._stream.write(self.line() + "\n")
            self._stream.flush()

    def note(self, **figures: object) -> None:
        """Show these figures beside the count from now on."""
        self._figures.update(
            {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in figures.items()}
        )
        if self._bar is not None:
            self._bar.set_postfix(self._figures, refresh=False)

    def update(self, count: int = 1) -> None:
        """Count `count` more as done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._enabled and time.monotonic() - self._last_line >= self._line_every_seconds:
            self._last_line = time.monotonic()
            self._stream.write(self.line() + "\n")
            self._stream.flush()

    def line(self) -> str:
        """Say in one line: what, how much of how much, rate, time left or taken, figures."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = self.done / seconds
        share = f"{self.done}/{self.total}" if self.total is not None else str(self.done)
        if self.total is not None and 0 < self.done < self.total:
            clock = f"ETA {format_seconds((self.total - self.done) / rate)}"
        else:
            clock = f"in {format_seconds(seconds)}"
        figures = "".join(f" {name}={value}" for name, value in self._figures.items())
        return f"{self._description}: {share} {self._unit}, {rate:,.1f} {self._unit}/s, {clock}{figures}"
