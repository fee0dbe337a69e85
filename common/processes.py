"""Start processes that leave nothing behind.

A child runs in its own process group, gets what the command gets (INT, TERM and HUP arrive as TERM, so that it can
save), and is killed by the kernel when the command itself is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

STOP_SECONDS = 40.0  # between TERM and KILL: a rank saves when it is told to stop
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def free_port() -> int:
    """A port on the loopback that nobody listens on now; the default one collides between runs on one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Child(Protocol):
    """A process that was started here: a plain one, or one made by a warm server."""

    @property
    def pid(self) -> int:
        """Its id, which is also its group's."""
        ...

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; raises subprocess.TimeoutExpired."""
        ...


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent ends (Linux): killed launchers leave no rank running.

    `parent` is the process id that the caller knows its parent by; when that one is gone already, this ends here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent:
            os._exit(1)


def die_with_torchrun() -> None:
    """Ask for the same where a torchrun is the parent: its ranks are in sessions of their own, and would be left."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()


def start(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, output: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a child in a group of its own; call from the main thread, whose end the kernel takes as the command's.

    `environment` adds to ours. Standard output and error are appended to `output` if it is given.
    """
    parent = os.getpid()
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(output.open("ab")) if output is not None else None
        return subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(parent),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
        )


def kill_group(process: Child, number: signal.Signals) -> None:
    """Send a signal to the process and everything that it has started; nothing happens if all are gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def stop(process: Child, *, seconds: float = STOP_SECONDS) -> None:
    """End a child and its group: TERM, `seconds` of patience, KILL. Returns when the child is gone."""
    if process.poll() is None:
        kill_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
    kill_group(process, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def passing_signals_to(processes: Collection[Child]) -> Iterator[list[int]]:
    """While inside, INT, TERM and HUP go to the children as TERM; yields the list of the signals that came."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            kill_group(process, signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
