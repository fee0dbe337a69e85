"""Whether a job that ended before its work did should be started again: asked by the templates, of files alone.

    python -m potstill.launch.next_turn dump --turns FILE --store data/targets
    python -m potstill.launch.next_turn train --turns FILE --config run.yaml --set a.b=value

Ends with 0 where another turn makes sense; with 75 where a person has stopped the run by a file `stop` in its folder;
with 1 where turns in a row have made no progress (no unit committed by any worker; no new checkpoint), because a job
whose time limit is shorter than its loading would begin again and again. FILE keeps the count between a job's turns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from potstill.common.entry_point import run_command
from potstill.common.errors import UserError
from potstill.common.exit_codes import DONE, PREEMPTED
from potstill.common.options import add_traceback_option, parse_arguments, read_config

PROGRAM = "potstill.launch.next_turn"
MAX_IDLE_TURNS = 3


class NoProgressError(UserError):
    """Turns in a row have moved nothing; the message says how many, where the work stands, and what to change."""


@dataclass(frozen=True)
class Standing:
    """How far a job's work is: a number that only grows, the same in words, and what may keep it from growing."""

    progress: int
    text: str
    advice: str
    stopped: str | None = None  # why no other turn is wanted, in words


def _dump_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", nargs="+", required=True, metavar="STORE", help="what the workers write")


def _dump_standing(arguments: argparse.Namespace) -> Standing:
    from potstill.storage import NotAStoreError, store_status

    committed = 0
    for store in arguments.store:
        try:
            committed += store_status(store).committed
        except NotAStoreError:
            continue  # no worker has come so far
    return Standing(
        committed,
        f"{' and '.join(arguments.store)}: {committed} units committed",
        "is the time limit shorter than loading the teacher and one unit? Give more time, or fewer rows to a unit",
    )


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    from potstill.student_train.command_line import add_train_options

    add_train_options(parser)


def _train_standing(arguments: argparse.Namespace) -> Standing:
    from potstill.student_train.config.train import TrainConfig
    from potstill.student_train.run.checkpoint_files import newest_step
    from potstill.student_train.run.stop import StoppedByFileError, refuse_if_stopped

    run = read_config(TrainConfig, arguments).run.output_dir
    step, stopped = newest_step(run), None
    try:
        refuse_if_stopped(run)
    except StoppedByFileError as error:
        stopped = str(error)
    return Standing(
        step,
        f"run {run}: newest checkpoint at step {step}",
        "is the time limit shorter than loading and one step? Give more time; if the ranks ended with errors, they say "
        "why above",
        stopped,
    )


@dataclass(frozen=True)
class Kind:
    """A kind of job: its options, and how to see how far it is."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    standing: Callable[[argparse.Namespace], Standing]


KINDS = {"dump": Kind(_dump_arguments, _dump_standing), "train": Kind(_train_arguments, _train_standing)}


def judge(standing: Standing, turns: Path, *, max_idle_turns: int) -> int:
    """Count the turn that has just ended in the file `turns`; a new one counts from 0. Returns the idle ones in a row.

    Raises NoProgressError when they are `max_idle_turns`.
    """
    before = json.loads(turns.read_text(encoding="utf-8")) if turns.exists() else {"progress": 0, "idle_turns": 0}
    idle = before["idle_turns"] + 1 if standing.progress <= before["progress"] else 0
    part = turns.with_name(f"{turns.name}.part")
    part.write_text(json.dumps({"progress": standing.progress, "idle_turns": idle}), encoding="utf-8")
    os.replace(part, turns)
    if idle >= max_idle_turns:
        raise NoProgressError(
            f"{standing.text}; {idle} turns in a row moved nothing, so none is added: {standing.advice}"
        )
    return int(idle)


def _work(arguments: argparse.Namespace) -> int:
    standing = KINDS[arguments.kind].standing(arguments)
    if standing.stopped is not None:
        print(f"{PROGRAM}: no other turn: {standing.stopped}", file=sys.stderr)
        return PREEMPTED
    judge(standing, arguments.turns, max_idle_turns=arguments.max_idle_turns)
    print(f"{PROGRAM}: {standing.text}; another turn", file=sys.stderr)
    return DONE


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; leaves the program with code 2 if it is wrong."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="|".join(KINDS))
    for name, kind in KINDS.items():
        own = kinds.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter)
        own.set_defaults(parser=own)
        own.add_argument("--turns", type=Path, required=True, metavar="FILE", help="keeps the count; made if not there")
        own.add_argument("--max-idle-turns", type=int, default=MAX_IDLE_TURNS, metavar="N", help="default: %(default)s")
        add_traceback_option(own)
        kind.add_arguments(own)
    return parse_arguments(parser, words)


def main(words: Sequence[str] | None = None) -> int:
    """Judge one turn; returns the exit code."""
    arguments = parse(words)
    return run_command(partial(_work, arguments), program=PROGRAM, show_traceback=arguments.traceback)


if __name__ == "__main__":
    sys.exit(main())
