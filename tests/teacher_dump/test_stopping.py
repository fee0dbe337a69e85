"""The watch of a worker: a signal while a read hangs ends the process at once, and one while nothing does, in time."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from potstill.storage.files import waiting
from potstill.teacher_dump import stopping
from potstill.teacher_dump.stopping import StopFlag


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("hangs", [True, False], ids=["a read hangs", "no read hangs"])
def test_who_waits_for_a_read_that_hangs_is_ended_at_once(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, hangs: bool
) -> None:
    monkeypatch.setattr(waiting, "STUCK_SECONDS", 0.1)
    monkeypatch.setattr(stopping, "_LOOK_SECONDS", 0.02)
    release, ended = threading.Event(), threading.Event()
    names: list[str] = []

    def read() -> None:
        waiting.waiting_for("a file", lambda wait: release.wait(20))

    def end(name: str) -> None:
        names.append(name)
        ended.set()

    reader = threading.Thread(target=read, daemon=True)
    if hangs:
        reader.start()
    try:
        with StopFlag(seconds=1.0, end=end):
            started = time.monotonic()
            try:
                os.kill(os.getpid(), number)
                assert ended.wait(10)
            except KeyboardInterrupt:
                assert number == signal.SIGINT and ended.wait(10)
            seconds = time.monotonic() - started
    finally:
        release.set()
    assert names == [number.name]
    assert seconds < 0.8 if hangs else seconds >= 1.0
