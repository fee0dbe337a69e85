"""End cleanly when a scheduler asks: SIGTERM and SIGUSR1 set a flag that the worker looks at between batches.

A batch that takes longer than a scheduler waits is not waited for, nor is a read that does not come back: the process
ends then and there, after an interrupt from the keyboard as well. Nothing is lost by that, because a unit is there when
its record is, and not before.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from potstill.common.exit_codes import INTERRUPTED, PREEMPTED
from potstill.storage import stuck_read

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
WATCHED_SIGNALS = (*STOP_SIGNALS, signal.SIGINT)  # that one keeps its handler, which raises KeyboardInterrupt
GRACE_SECONDS = 8.0  # a worker ends within 10 s of the signal, within 2 s where it waits for a read that hangs
_LOOK_SECONDS = 0.1


def _end_process(signal_name: str) -> None:
    log.warning(
        "%s received, and what is under way is not done: the worker ends here, what is committed is safe", signal_name
    )
    os._exit(INTERRUPTED if signal_name == signal.SIGINT.name else PREEMPTED)


class StopFlag:
    """Catches the stop signals while it is open; `signal_name` is the first one received, or None.

    When it is still open `seconds` after a signal, or when a read hangs by then, `end` is called in a thread. Outside
    the main thread no handler can be set, so there the signals keep the meaning they have.
    """

    def __init__(self, *, seconds: float = GRACE_SECONDS, end: Callable[[str], None] = _end_process) -> None:
        self.signal_name: str | None = None
        self._seconds, self._end = seconds, end
        self._previous: dict[signal.Signals, Any] = {}
        self._closed = threading.Event()
        self._watch: _Watch | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._caught)
            self._watch = _Watch(self._too_long)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._watch is not None:
            self._watch.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        # Only a flag: the handler runs between any two instructions.
        self.signal_name = self.signal_name or signal.Signals(number).name

    def _too_long(self, number: int) -> None:
        deadline = time.monotonic() + self._seconds
        while not self._closed.wait(_LOOK_SECONDS):
            stuck = stuck_read()
            if stuck is not None:
                log.warning("%s: a read has not come back for %.1f s", stuck.what, stuck.seconds())
            if stuck is not None or time.monotonic() > deadline:
                self._end(signal.Signals(number).name)
                return


class _Watch:
    """Calls `on_signal` in a thread at the first stop signal, also while the main thread is deep in one long call."""

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        self._on_signal = on_signal
        # The interpreter writes the numbers of signals here as they come, before any handler has its turn.
        self._source, self._sink = os.pipe()
        os.set_blocking(self._sink, False)
        self._before = signal.set_wakeup_fd(self._sink, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="stop-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while numbers := os.read(self._source, 64):
            if self._before != -1:
                os.write(self._before, numbers)  # an event loop around us waits for them too
            if asked := [number for number in numbers if number in WATCHED_SIGNALS]:
                self._on_signal(asked[0])
                return

    def close(self) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._sink)
        self._thread.join()
        os.close(self._source)
