"""A run that is asked to stop does not wait for a read that hangs, and only as long as it is open."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from potstill.common.errors import PreemptedError
from potstill.storage.files import waiting
from potstill.storage.files.waiting import waiting_for
from potstill.student_train.run.stop import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_a_read_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(waiting, "STUCK_SECONDS", 0.2)
    release = threading.Event()
    with StopRequest(tmp_path, max_runtime_minutes=None) as stop:
        os.kill(os.getpid(), number)
        with pytest.raises(PreemptedError, match=f"stopped by {number.name} while a read of a file had not come back"):
            waiting_for("a file", lambda wait: release.wait(20))
        release.set()
        assert stop.reason() == f"signal {number.name}"
    assert waiting_for("a file", lambda wait: time.sleep(0.5) or "there") == "there"
