"""A Ray cluster of this machine alone for the tests: its own folder, no figures to anybody, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
POTSTILL = [sys.executable, "-m", "potstill.launch"]


@contextlib.contextmanager
def ray_folder() -> Iterator[dict[str, str]]:
    """The environment of processes that start or join a cluster; all of Ray that still runs at the end is killed."""
    # Sockets of Ray lie there, whose paths may have 107 bytes: pytest's folders are too deep.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    environment = {
        **os.environ,
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_DEDUP_LOGS": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        # Of this checkout, also in the processes that Ray starts.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])),
    }
    environment.pop("RAY_ADDRESS", None)
    try:
        yield environment
    finally:
        for pid in _of_folder(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _of_folder(folder: Path) -> list[int]:
    """Processes that were started with this folder as that of Ray."""
    wanted = f"RAY_TMPDIR={folder}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in entry.read_bytes().split(b"\0") and int(entry.parent.name) != os.getpid():
                found.append(int(entry.parent.name))
    return found


def actors(environment: dict[str, str], name: str = "TeacherActor") -> list[int]:
    """Process ids of the actors of a class, in the order of their start."""
    found = []
    for pid in _of_folder(Path(environment["RAY_TMPDIR"])):
        with contextlib.suppress(OSError):
            if f"ray::{name}" in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace"):
                found.append(pid)
    return sorted(found)


@contextlib.contextmanager
def started(command: Sequence[str], environment: dict[str, str], cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """A command in a group of its own, which is killed at the end; its output goes to `out.txt` in cwd."""
    with open(cwd / "out.txt", "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until(reached: Callable[[], object], process: subprocess.Popen[str], *, seconds: float = 300.0) -> None:
    """Wait for something while the process runs; an AssertionError else."""
    end = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None, f"it ended with {process.returncode} before"
        assert time.monotonic() < end, "it did not come to that in time"
        time.sleep(0.05)


def end_of(process: subprocess.Popen[str], cwd: Path, *, seconds: float = 300.0) -> tuple[int, str]:
    """Exit code and output of a command."""
    code = process.wait(timeout=seconds)
    return code, (cwd / "out.txt").read_text(encoding="utf-8")


@contextlib.contextmanager
def several_nodes(environment: dict[str, str], folder: Path) -> Iterator[tuple[str, Callable[[str], None]]]:
    """The address of a cluster without a worker, and what adds and removes nodes."""
    script = Path(__file__).with_name("ray_nodes.py")
    with open(folder / "nodes.txt", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(script)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def answer() -> str:
        for line in stdout:
            if not line.strip() or line[0].isdigit() or line.startswith("done"):
                return line.strip()
        raise AssertionError((folder / "nodes.txt").read_text())

    def tell(line: str) -> None:
        stdin.write(line + "\n")
        stdin.flush()
        assert answer() == "done"

    try:
        yield answer(), tell
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
