"""The ranks of one node of a run, where a scheduler starts a container per node: `python -m potstill.launch.node`.

What follows goes to each rank (`--config run.yaml --set a.b=value`). The place is read from the environment: NODES,
RANKS_PER_NODE, JOB_COMPLETION_INDEX (or NODE_RANK), MASTER_ADDR, MASTER_PORT.

Ranks that end before the run is done are started again in the same container: when another node is evicted, all ranks
save and end with 75, and these here wait for its replacement. A container that ended then would cost a retry of the
scheduler for each node and each eviction. So the exit code is a last word: 0 done; 75 stopped by a person (a file
`stop` in the run's folder); 1 turns in a row without a new checkpoint; 2 a wrong command line. 128 + a signal: told to
go itself, by TERM, which the ranks are given the time to save by; whoever comes in its place continues.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from potstill.common.entry_point import run_command
from potstill.common.errors import ConfigError
from potstill.common.exit_codes import DONE, PREEMPTED, USAGE
from potstill.common.log import setup_logging
from potstill.common.options import read_config
from potstill.launch import next_turn
from potstill.launch.ranks import Node, run_ranks
from potstill.student_train.run.checkpoint_files import DONE_FILE

PROGRAM = "potstill.launch.node"
RANK_MODULE = "potstill.student_train"
MAX_IDLE_TURNS = 10
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = (
    5.0,
    300.0,
)  # after a turn that moved nothing, doubled each time: half an hour in all
log = logging.getLogger(PROGRAM)


def node_from(environment: Mapping[str, str]) -> tuple[Node, int]:
    """The place of this node and its number of ranks. Raises ConfigError that names the variable."""

    def value(*names: str) -> str:
        for name in names:
            if environment.get(name):
                return environment[name]
        raise ConfigError(f"{' or '.join(names)} is not set; a container of a run needs it to know its place")

    def number(*names: str) -> int:
        text = value(*names)
        if not text.isdecimal():
            raise ConfigError(f"{' or '.join(names)}: expected a whole number, found {text!r}")
        return int(text)

    index, nodes = number("NODE_RANK", "JOB_COMPLETION_INDEX"), number("NODES")
    if not index < nodes:
        raise ConfigError(f"node {index} of NODES={nodes}: expected 0 to {nodes - 1}; completions must be NODES")
    return Node(index, nodes, value("MASTER_ADDR"), number("MASTER_PORT")), number("RANKS_PER_NODE")


def done_mark(run: Path) -> tuple[int, int] | None:
    """What tells one mark of a done run from another; None where there is none."""
    try:
        found = (run / DONE_FILE).stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def run_node(words: Sequence[str], *, node: Node, num_ranks: int, turns: Path) -> int:
    """Run the ranks until there is nothing left to start them for; returns the exit code of the container."""
    from potstill.student_train.config.train import TrainConfig

    asked = next_turn.parse(["train", "--turns", str(turns), "--max-idle-turns", str(MAX_IDLE_TURNS), *words])
    run = read_config(TrainConfig, asked).run.output_dir
    while True:
        before = done_mark(run)
        end = run_ranks(RANK_MODULE, words, num_ranks=num_ranks, fine=(DONE, PREEMPTED), node=node)
        if end.signals:
            return 128 + end.signals[0]
        if USAGE in end.codes:
            return USAGE
        standing = next_turn.KINDS["train"].standing(asked)
        after = done_mark(run)
        if not any(end.codes) or after not in (None, before):
            return DONE  # the last words of another node's ranks may have cost these here their good end
        if standing.stopped is not None:
            log.warning("%s", standing.stopped)
            return PREEMPTED
        idle = next_turn.judge(standing, turns, max_idle_turns=asked.max_idle_turns)
        pause = min(PAUSE_SECONDS * 2**idle, LONGEST_PAUSE_SECONDS) if idle else 0.0
        log.warning("ranks ended with %s; %s; again in %.0f s", list(end.codes), standing.text, pause)
        time.sleep(pause)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main(words: Sequence[str] | None = None) -> int:
    """Run one node; returns the exit code."""
    # The kernel gives the first process of a container no signal that it has no handler for.
    signal.signal(signal.SIGTERM, _leave)
    setup_logging()
    given = list(sys.argv[1:] if words is None else words)

    def work(scratch: str) -> int:
        node, num_ranks = node_from(os.environ)
        return run_node(given, node=node, num_ranks=num_ranks, turns=Path(scratch) / "turns.json")

    with tempfile.TemporaryDirectory(prefix="potstill-node-") as scratch:
        return run_command(partial(work, scratch), program=PROGRAM, show_traceback=False)


if __name__ == "__main__":
    sys.exit(main())
