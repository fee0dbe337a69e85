"""Start commands from a server that has imported torch, DeepSpeed and transformers once, instead of once for each.

A command costs some six seconds of imports before it does anything; a fork of a process that has them costs none. For
CPU machines only: a process that has touched CUDA cannot be forked, and DeepSpeed touches it when it is imported.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from potstill.common.processes import die_with_parent

PRELOAD = [
    "torch",
    "deepspeed",
    "transformers.models.llama.modeling_llama",
    "torch._inductor.compile_fx",  # DeepSpeed imports it with its first ZeRO engine
    "networkx",
    "potstill.storage",
    "potstill.student_train.run.trainer",
    "potstill.teacher_dump.dumping",
]


class WarmChild:
    """A forked command, with the face of a plain child."""

    def __init__(self, words: Sequence[str], output: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_run, args=(list(words), str(output)))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("potstill", timeout)
        return self._process.exitcode


def warm_up() -> None:
    """Tell the server what to import; it starts with the first child and takes the environment as it is then."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)


def _run(words: list[str], output: str) -> None:
    """In the fork: its own group, its output into the log, then the command as from a shell."""
    die_with_parent(os.getppid())  # the server, which ends when the command that started it ends
    os.setsid()
    sink = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    sys.argv = ["potstill", *words]
    runpy.run_module("potstill.launch", run_name="__main__")
