"""`deepspeed --module potstill.student_train --config run.yaml --set a.b=value`: one rank of a training run.

Any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT will do; without one it runs alone.
Options, messages and exit codes are those of `potstill train` (common/exit_codes.py): 0 done, 75 stopped early and
saved (start again to continue), 1 an error (the last line says what), 2 a wrong command line.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.common.entry_point import leave, run_command
from potstill.common.errors import FORESEEN_ERRORS, PreemptedError
from potstill.common.exit_codes import DONE, ERROR, PREEMPTED
from potstill.common.log import setup_logging
from potstill.common.noise import noise_to
from potstill.common.options import add_traceback_option, parse_arguments, read_config
from potstill.student_train.command_line import add_train_options
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.run.rank_report import (
    FOLDER_VARIABLE,
    LOG_VARIABLE,
    OnceForAllRanks,
    write_error,
    write_summary,
)

if TYPE_CHECKING:
    from potstill.student_train.run.summary import TrainSummary

PROGRAM = "potstill.student_train"
log = logging.getLogger(PROGRAM)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; leaves the program with code 2 if it is wrong."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # as the command: what one door refuses the other must not take
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help="from the launcher; LOCAL_RANK decides")
    add_traceback_option(parser)
    add_train_options(parser)
    return parse_arguments(parser, words)


def main(words: Sequence[str] | None = None) -> int:
    """Run one rank; returns the exit code.

    Started by `potstill train`, a rank leaves its end in a file for that command, and only its log and progress reach
    the console. Under any other launcher it says everything itself.
    """
    options = parse(words)
    setup_logging()
    if FOLDER_VARIABLE not in os.environ:
        # The lines of the log are marked so as well (common/log.py).
        program = f"{PROGRAM} [rank {os.environ['RANK']}]" if "RANK" in os.environ else PROGRAM
        return run_command(partial(run_alone, options), program=program, show_traceback=options.traceback)
    reports = Path(os.environ[FOLDER_VARIABLE])
    for handler in logging.getLogger("potstill").handlers:
        handler.addFilter(OnceForAllRanks(reports))
    with noise_to(Path(os.environ[LOG_VARIABLE])):
        return run_reported(options, reports)


def run_alone(options: argparse.Namespace) -> int:
    """Train and log the summary; returns the exit code. Raises what went wrong."""
    from potstill.student_train.run.stop import StoppedByFileError

    try:
        summary = train_rank(options)
    except StoppedByFileError:
        end_torchrun()  # a start that is refused for it would be refused again
        raise
    log.info("%s", summary.format())
    if not summary.is_done and not summary.status.startswith(("signal", "another rank")):
        end_torchrun()
    return DONE if summary.is_done else PREEMPTED


def end_torchrun() -> None:
    """End the torchrun that would start its ranks again, where one has: by TERM, as a person would.

    It takes 75 for a failure. After a signal it is left alone: it sends them itself when a machine joins or leaves.
    """
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0 and os.environ.get("LOCAL_RANK") == "0":
        os.kill(os.getppid(), signal.SIGTERM)


def run_reported(options: argparse.Namespace, reports: Path) -> int:
    """Train and leave the summary or the error in the folder `reports`; returns the exit code."""
    rank = int(os.environ.get("RANK", 0))
    try:
        summary = train_rank(options)
    except Exception as error:
        write_error(reports, rank=rank, error=error, foreseen=isinstance(error, FORESEEN_ERRORS))
        traceback.print_exc(file=sys.stdout)  # the log file
        if isinstance(error, PreemptedError):
            leave(ERROR)  # of a rank, so that the launcher does not wait for the others
        return ERROR
    if rank == 0:
        write_summary(reports, summary)
    return DONE if summary.is_done else PREEMPTED


def train_rank(options: argparse.Namespace) -> TrainSummary:
    """Read the configuration and train this rank's part; ends with its launcher and leaves no process group."""
    from potstill.common.processes import die_with_parent, die_with_torchrun
    from potstill.student_train.run.engine import stop_distributed, world_from_environment
    from potstill.student_train.run.trainer import train

    try:
        _, world_size = world_from_environment()
        if world_size > 1:
            die_with_parent()
        die_with_torchrun()  # also the one rank that is left of many
        return train(read_config(TrainConfig, options))
    finally:
        stop_distributed()


if __name__ == "__main__":
    sys.exit(main())
