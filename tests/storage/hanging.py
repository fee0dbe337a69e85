"""Processes whose reads of some paths do not come back: a mount that hangs, by a library that is loaded before libc."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("hanging.c")


class HangingMount:
    """Reads of paths that hold `mark` wait from `hang()` to `answer()`, in all processes that were started here."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler, with which a read that hangs is made")
        self._library, self._gate = folder / "hanging.so", folder / "hangs"
        self._met = folder / "hangs.met"
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(self._library), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    def hang(self) -> None:
        self._met.unlink(missing_ok=True)
        self._gate.touch()

    def wait_until_met(self, *, seconds: float = 20.0) -> None:
        """Until a process has come to a read that hangs."""
        deadline = time.monotonic() + seconds
        while not self._met.exists():
            assert time.monotonic() < deadline, "no process has come to a read that hangs"
            time.sleep(0.01)

    def answer(self) -> None:
        self._gate.unlink(missing_ok=True)

    @contextmanager
    def process(
        self, arguments: list[str], mark: str, *, log: Path | None = None, **environment: str
    ) -> Iterator[subprocess.Popen[str]]:
        """`python ARGUMENTS` under the library, killed at the end; its output and errors come by pipes, or in `log`."""
        paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
        added = {"LD_PRELOAD": str(self._library), "HANG_PATH": mark, "HANG_WHILE": str(self._gate)}
        sink = subprocess.PIPE if log is None else log.open("w")
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **added, **environment},
            cwd=ROOT,
            stdout=sink,
            stderr=sink,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr, sink):
                if stream is not None and not isinstance(stream, int):
                    stream.close()
