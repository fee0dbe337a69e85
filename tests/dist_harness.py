"""Run a function on several gloo ranks, cheaply: children of a fork server that has the slow imports behind it.

Functions must be importable (not defined in a test file). Every call is bounded in time, and what still lives at its
end is killed.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import queue
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from potstill.common.processes import free_port

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch",
        "deepspeed",
        "transformers.models.llama.modeling_llama",
        "torch._inductor.compile_fx",  # ZeRO 1-3 pull it in at their first engine: seconds per child otherwise
        "networkx",
        "potstill.student_train.run.trainer",
    ]
)


def _rank_main(
    function: Callable[..., Any], rank: int, world: int, port: int, results: Any, args: Sequence[Any]
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)  # what a rank that does not answer is asked
    try:
        answer = (rank, True, function(*args))
    except BaseException:
        answer = (rank, False, traceback.format_exc())
    results.put(answer)
    # A function that has run the exit functions itself has spent those that would wait for the answer to be sent.
    results.close()
    results.join_thread()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Ranks:
    """Started ranks of one function. Use as a context manager; leaving it kills what is left."""

    def __init__(self, function: Callable[..., Any], *, world: int, args: Sequence[Any] = ()) -> None:
        port = free_port()
        self._results = _CONTEXT.Queue()
        self._world = world
        self.processes = [
            _CONTEXT.Process(target=_rank_main, args=(function, rank, world, port, self._results, args), daemon=True)
            for rank in range(world)
        ]

    def __enter__(self) -> Ranks:
        for process in self.processes:
            process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.join(timeout=10 if error is None else 0)
            if process.is_alive():
                process.kill()
                process.join(timeout=10)

    def kill(self) -> None:
        """SIGKILL every rank, as a machine that loses its power does."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(timeout=10)

    def results(self, *, timeout_seconds: float) -> list[Any]:
        """What each rank returned, by rank. AssertionError with the rank's traceback, or on time-out."""
        end = time.monotonic() + timeout_seconds
        found: dict[int, Any] = {}
        while len(found) < self._world:
            try:
                rank, fine, value = self._results.get(timeout=max(0.1, end - time.monotonic()))
            except queue.Empty:
                silent = sorted(set(range(self._world)) - set(found))
                raise AssertionError(f"ranks {silent} did not answer: {self._tell_where(silent)}") from None
            assert fine, f"rank {rank} raised:\n{value}"
            found[rank] = value
        return [found[rank] for rank in range(self._world)]

    def _tell_where(self, ranks: Sequence[int]) -> str:
        """Let ranks print their stacks to standard error; says which of them have ended instead."""
        told = []
        for rank in ranks:
            process = self.processes[rank]
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGUSR2)
                told.append(f"{rank} lives, its stack is on standard error")
            else:
                told.append(f"{rank} has ended with exit code {process.exitcode}")
        time.sleep(1)  # for the stacks to be written before the processes are killed
        return ", ".join(told)


def run_ranks(function: Callable[..., Any], *args: Any, world: int, timeout_seconds: float = 90.0) -> list[Any]:
    """Call `function(*args)` on `world` ranks and return their results by rank."""
    with Ranks(function, world=world, args=args) as ranks:
        return ranks.results(timeout_seconds=timeout_seconds)
