"""`deepspeed --module potstill.student_train --config run.yaml --set a.b=value`: one rank of a training run.

Any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT will do; without one it runs alone.
Exit codes are those of `potstill` (common/exit_codes.py): 0 done, 75 stopped early and saved (start again to continue),
1 something must be mended first (the last line of the log says what), 2 a wrong command line.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from potstill.common.config import load_config
from potstill.common.errors import UserError
from potstill.common.exit_codes import DONE, ERROR, PREEMPTED
from potstill.common.log import setup_logging

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
    """Run one rank; returns the exit code."""
    options = parse(arguments)
    setup_logging()
    from potstill.storage import StoreError
    from potstill.student_train import train
    from potstill.student_train.config import TrainConfig
    from potstill.student_train.distributed import die_with_parent, stop_distributed, world_from_environment

    try:
        if world_from_environment()[1] > 1:
            die_with_parent()
        summary = train(load_config(TrainConfig, options.config, options.overrides))
    except (UserError, StoreError, OSError) as error:
        # OSError: no space, no permission; its text names the file.
        log.error("%s", error)
        return ERROR
    finally:
        stop_distributed()
    log.info("%s", summary.format())
    return DONE if summary.is_done else PREEMPTED


if __name__ == "__main__":
    sys.exit(main())
