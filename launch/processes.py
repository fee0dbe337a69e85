"""Start processes that leave nothing behind: children of a command, and the ranks of a training run.

A child runs in its own process group, gets what the command gets (INT, TERM and HUP arrive as TERM, so that it can
save), and is killed by the kernel when the command itself is killed.

Ranks of this machine are started directly, with the variables that any launcher sets. DeepSpeed's launcher (0.19)
would add a process that imports torch before the first rank starts, print whole command lines as errors, overwrite
CUDA_VISIBLE_DEVICES, say 1 where a rank said 75, and kill a rank that saves for longer than 30 s. Across machines it,
or torchrun, is what starts `python -m potstill.student_train`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

STOP_SECONDS = 40.0  # between TERM and KILL: a rank saves when it is told to stop
LAST_WORDS_SECONDS = 15.0  # for the other ranks when one has failed: most fail too, and say why
POLL_SECONDS = 0.05
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def free_port() -> int:
    """A port on the loopback that nobody listens on now; the default one collides between runs on one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def count_devices() -> int:
    """GPUs that torch sees here, 0 on a CPU machine."""
    import torch

    return torch.cuda.device_count()


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


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when `parent`, its parent, ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


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


@dataclass(frozen=True)
class RanksEnd:
    """How the ranks of a run ended."""

    codes: tuple[int, ...]  # by rank; negative: ended by that signal
    failed: tuple[int, ...]  # ranks that ended by themselves with a code that is not fine, in that order
    signals: tuple[int, ...]  # that came for the command and were passed on


def rank_environment(rank: int, num_ranks: int, *, port: int) -> dict[str, str]:
    """What a launcher tells a rank of this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),  # torchrun's name
        "LOCAL_SIZE": str(num_ranks),  # DeepSpeed's
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # Ranks share the cores; with the default of one thread per core each they get in each other's way.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // num_ranks)),
    }


def run_ranks(
    module: str,
    arguments: Sequence[str],
    *,
    num_ranks: int,
    environment: Mapping[str, str] | None = None,
    fine: Collection[int] = (0,),
) -> RanksEnd:
    """Run `num_ranks` ranks of `python -m module arguments...` on this machine to their end.

    When one ends with a code that is not in `fine`, the others have LAST_WORDS_SECONDS to end by themselves (they wait
    for it in a collective call, and most say so), then they are stopped. The codes alone do not prove that the work is
    done: ask the run folder. `environment` adds to ours.
    """
    command = [sys.executable, "-u", "-m", module, *arguments]
    port = free_port()
    ranks: list[subprocess.Popen[bytes]] = []
    failed: list[int] = []
    deadline = float("inf")
    try:
        with passing_signals_to(ranks) as received:
            for rank in range(num_ranks):
                place = rank_environment(rank, num_ranks, port=port)
                ranks.append(start(command, environment={**(environment or {}), **place}))
                if received:  # it went to the ranks that were there
                    kill_group(ranks[-1], signal.SIGTERM)
            while time.monotonic() < deadline:
                codes = [process.poll() for process in ranks]
                new = [rank for rank, code in enumerate(codes) if code not in (None, *fine) and rank not in failed]
                # Of those that ended since the last look, one that was killed is the cause of the others' errors.
                failed += sorted(new, key=lambda rank: (codes[rank] or 0) > 0)
                if None not in codes:
                    break
                if failed and deadline == float("inf"):
                    deadline = time.monotonic() + LAST_WORDS_SECONDS
                time.sleep(POLL_SECONDS)
    finally:
        for process in ranks:
            kill_group(process, signal.SIGKILL)  # one that waits for a rank that is gone, and what a rank has started
            process.wait()
    return RanksEnd(tuple(process.wait() for process in ranks), tuple(failed), tuple(received))
