"""Start the ranks of a training run on this machine.

Ranks of this machine are started directly, with the variables that any launcher sets. DeepSpeed's launcher (0.19)
would add a process that imports torch before the first rank starts, print whole command lines as errors, overwrite
CUDA_VISIBLE_DEVICES, say 1 where a rank said 75, and kill a rank that saves for longer than 30 s. Across machines it,
or torchrun, is what starts `python -m potstill.student_train`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from potstill.common.processes import free_port, kill_group, passing_signals_to, start

LAST_WORDS_SECONDS = 15.0  # for the other ranks when one has failed: most fail too, and say why
POLL_SECONDS = 0.05


def count_devices() -> int:
    """GPUs that torch sees here, 0 on a CPU machine."""
    import torch

    return torch.cuda.device_count()


@dataclass(frozen=True)
class RanksEnd:
    """How the ranks of a run ended."""

    codes: tuple[int, ...]  # by rank; negative: ended by that signal
    failed: tuple[int, ...]  # ranks that ended by themselves with a code that is not fine, in that order
    signals: tuple[int, ...]  # that came for the command and were passed on


@dataclass(frozen=True)
class Node:
    """Where this machine stands in a run of several, each with as many ranks, and where its rank 0 is found."""

    rank: int
    num_nodes: int
    master_addr: str
    master_port: int


def rank_environment(rank: int, num_ranks: int, *, node: Node) -> dict[str, str]:
    """What a launcher tells a rank of this machine, which has `num_ranks` of them."""
    return {
        "RANK": str(node.rank * num_ranks + rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(node.num_nodes * num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),  # torchrun's name
        "LOCAL_SIZE": str(num_ranks),  # DeepSpeed's
        "MASTER_ADDR": node.master_addr,
        "MASTER_PORT": str(node.master_port),
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
    node: Node | None = None,
) -> RanksEnd:
    """Run `num_ranks` ranks of `python -m module arguments...` on this machine to their end.

    They are the whole run, or those of one `node` of it.

    When one ends with a code that is not in `fine`, the others have LAST_WORDS_SECONDS to end by themselves (they wait
    for it in a collective call, and most say so), then they are stopped. The codes alone do not prove that the work is
    done: ask the run folder. `environment` adds to ours.
    """
    command = [sys.executable, "-u", "-m", module, *arguments]
    node = node or Node(0, 1, "127.0.0.1", free_port())
    ranks: list[subprocess.Popen[bytes]] = []
    failed: list[int] = []
    deadline = float("inf")
    try:
        with passing_signals_to(ranks) as received:
            for rank in range(num_ranks):
                place = rank_environment(rank, num_ranks, node=node)
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
