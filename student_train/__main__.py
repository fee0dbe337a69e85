"""`deepspeed --module potstill.student_train --config run.yaml --set a.b=value`: one rank of a training run.

Any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT will do; without one it runs alone.
Exit codes are those of `potstill` (common/exit_codes.py): 0 done, 75 stopped early and saved (start again to continue),
1 an error (the last line of the log says what), 2 a wrong command line.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from pathlib import Path

from potstill.common.config import load_config
from potstill.common.errors import UserError
from potstill.common.exit_codes import DONE, ERROR, PREEMPTED
from potstill.common.log import setup_logging
from potstill.common.noise import noise_to
from potstill.student_train.run.rank_report import (
    FOLDER_VARIABLE,
    LOG_VARIABLE,
    OnceForAllRanks,
    write_error,
    write_summary,
)

log = logging.getLogger("potstill.student_train")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="potstill.student_train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="YAML file; a preset of launch/presets is one too")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=value")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="from the launcher; LOCAL_RANK decides")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run one rank; returns the exit code.

    Started by `potstill train`, a rank leaves its end in a file for that command, and only its log and progress reach
    the console. Under any other launcher it says everything itself.
    """
    options = parse(arguments)
    setup_logging()
    if FOLDER_VARIABLE not in os.environ:
        return run_rank(options, reports=None)
    reports = Path(os.environ[FOLDER_VARIABLE])
    for handler in logging.getLogger("potstill").handlers:
        handler.addFilter(OnceForAllRanks(reports))
    with noise_to(Path(os.environ[LOG_VARIABLE])):
        return run_rank(options, reports=reports)


def run_rank(options: argparse.Namespace, *, reports: Path | None) -> int:
    """Train; returns the exit code. Errors and the summary go to the log, or to the folder of reports."""
    from potstill.common.processes import die_with_parent
    from potstill.kernels.types import SelfCheckError
    from potstill.storage import StoreError
    from potstill.student_train import train
    from potstill.student_train.config.train import TrainConfig
    from potstill.student_train.run.engine import stop_distributed, world_from_environment

    rank = 0
    try:
        rank, world_size = world_from_environment()
        if world_size > 1:
            die_with_parent()
        summary = train(load_config(TrainConfig, options.config, options.overrides))
    except Exception as error:
        # OSError: no space, no permission; its text names the file.
        foreseen = isinstance(error, (UserError, StoreError, SelfCheckError, OSError))
        if reports is None and not foreseen:
            raise
        if reports is None:
            log.error("%s", error)
            return ERROR
        write_error(reports, rank=rank, error=error, foreseen=foreseen)
        traceback.print_exc(file=sys.stdout)  # the log file
        return ERROR
    finally:
        stop_distributed()
    if reports is None:
        log.info("%s", summary.format())
    elif rank == 0:
        write_summary(reports, summary)
    return DONE if summary.is_done else PREEMPTED


if __name__ == "__main__":
    sys.exit(main())
