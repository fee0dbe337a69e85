"""The command `train`: check once, then train in this process, or start the ranks of this machine and judge their end.

Standard output holds the summary alone (and a line of JSON if asked for), whatever the number of ranks. The log of
potstill and the progress of rank 0 go to standard error; all that libraries print goes to a file in the run folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.common.config import dump_config
from potstill.common.errors import ConfigError, PreemptedError
from potstill.common.exit_codes import DONE, ERROR, INTERRUPTED, PREEMPTED
from potstill.common.noise import noise_to
from potstill.common.options import read_config
from potstill.launch.command import Command
from potstill.launch.presets import find_preset
from potstill.launch.ranks import RanksEnd, count_devices, run_ranks

if TYPE_CHECKING:
    from potstill.student_train.config.train import TrainConfig
    from potstill.student_train.run.preflight import CheckedStart
    from potstill.student_train.run.summary import TrainSummary

RANK_MODULE = "potstill.student_train"
log = logging.getLogger("potstill.launch.train")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    from potstill.student_train.command_line import add_train_options

    parser.add_argument("--preset", metavar="NAME", help="start from a preset instead of --config (`potstill presets`)")
    parser.add_argument(
        "--num-ranks", type=int, metavar="N", help="processes on this machine; default: one for each GPU, else one"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything and print what would be done: stores, steps, batch, stages, memory; --num-ranks may "
        "then be more than this machine has",
    )
    parser.add_argument("--json", action="store_true", help="end standard output with one line of JSON")
    add_train_options(parser)


def _train(arguments: argparse.Namespace) -> int:
    from potstill.student_train.config.batch_arithmetic import accumulation_steps

    config = _read(arguments)
    if "RANK" in os.environ and not arguments.dry_run:
        return _one_of_many(config, as_json=arguments.json)
    num_ranks = _num_ranks(arguments)
    accumulation_steps(config, num_ranks)  # said at once, before seconds of imports
    with tempfile.TemporaryDirectory(prefix="potstill-train-") as scratch:
        return _check_and_run(config, num_ranks, Path(scratch), arguments)


def _read(arguments: argparse.Namespace) -> TrainConfig:
    from potstill.student_train.config.train import TrainConfig

    if arguments.preset is not None:
        if arguments.config is not None:
            raise ConfigError("give --preset or --config, not both; `potstill presets NAME` prints a preset to change")
        arguments.config = str(find_preset(arguments.preset).path)
    return read_config(TrainConfig, arguments)


def _num_ranks(arguments: argparse.Namespace) -> int:
    if arguments.num_ranks is None:
        return int(os.environ.get("WORLD_SIZE", 0)) or max(1, count_devices())
    if arguments.num_ranks < 1:
        raise ConfigError(f"--num-ranks {arguments.num_ranks}: expected 1 or more")
    return int(arguments.num_ranks)


def _check_and_run(config: TrainConfig, num_ranks: int, scratch: Path, arguments: argparse.Namespace) -> int:
    from potstill.student_train.run.rank_report import OnceForAllRanks

    if num_ranks > 1:  # the ranks check again, and would warn again
        for handler in logging.getLogger("potstill").handlers:
            handler.addFilter(OnceForAllRanks(scratch))
    with noise_to(scratch / "check.log"):
        from potstill.student_train.run.preflight import check_start

        start = check_start(config, num_ranks=num_ranks, planning=arguments.dry_run)
        figures = _dry_run(start) if arguments.dry_run else None
    if figures is not None:
        print(figures[0])
        _print_json(figures[1], arguments.json)
        return DONE
    for note in start.notes:
        log.warning("%s", note)
    log_file = _prepare(config, scratch)
    log.info("%d rank(s) on this machine; what libraries print goes to %s", num_ranks, log_file)
    if num_ranks == 1:
        return _in_this_process(start, log_file, as_json=arguments.json)
    return _on_ranks(config, num_ranks, scratch, log_file, as_json=arguments.json)


def _dry_run(start: CheckedStart) -> tuple[str, dict[str, object]]:
    from potstill.student_train.run.dry_run import dry_run
    from potstill.student_train.run.dry_run_text import format_dry_run

    figures = dry_run(start)
    return format_dry_run(figures), figures.to_json()


def _prepare(config: TrainConfig, scratch: Path) -> Path:
    """Make the run folder ready (with --force: empty), and a log file in it that begins with what the check printed."""
    from potstill.student_train.run.run_folder import new_log_file, prepare_run_folder
    from potstill.student_train.run.run_lock import ProcessMark, RunLock

    with RunLock(config.run.output_dir, (ProcessMark.here(0),)).take():  # then by the ranks themselves
        prepare_run_folder(config)
    log_file = new_log_file(config.run.output_dir)
    with log_file.open("a", encoding="utf-8") as file:
        file.write((scratch / "check.log").read_text(encoding="utf-8", errors="replace"))
    return log_file


def _unforced(config: TrainConfig) -> TrainConfig:
    """The same without run.force, which this command has seen to: a rank would delete the log."""
    return config.model_copy(update={"run": config.run.model_copy(update={"force": False})})


def _in_this_process(start: CheckedStart, log_file: Path, *, as_json: bool) -> int:
    from potstill.student_train import train

    with noise_to(log_file):
        from potstill.student_train.run.engine import stop_distributed

        try:
            summary = train(_unforced(start.config), checked=start.run)
        finally:
            stop_distributed()
    return _tell(summary, as_json=as_json)


def _one_of_many(config: TrainConfig, *, as_json: bool) -> int:
    """This process is a rank of another launcher, which has its own ways with output."""
    from potstill.student_train import train
    from potstill.student_train.run.engine import stop_distributed

    try:
        summary = train(config)
    finally:
        stop_distributed()
    if os.environ["RANK"] == "0":
        return _tell(summary, as_json=as_json)
    return DONE if summary.is_done else PREEMPTED


def _on_ranks(config: TrainConfig, num_ranks: int, scratch: Path, log_file: Path, *, as_json: bool) -> int:
    """Start the ranks with exactly the configuration that was checked, and judge how they ended."""
    from potstill.student_train.run.rank_report import FOLDER_VARIABLE, LOG_VARIABLE, read_errors, read_summary
    from potstill.student_train.run.run_folder import read_done

    checked = scratch / "config.yaml"
    checked.write_text(dump_config(_unforced(config)), encoding="utf-8")
    end = run_ranks(
        RANK_MODULE,
        [f"--config={checked}"],
        num_ranks=num_ranks,
        environment={FOLDER_VARIABLE: str(scratch), LOG_VARIABLE: str(log_file)},
        fine=(DONE, PREEMPTED),
    )
    summary = read_summary(scratch)
    is_marked = read_done(config.run.output_dir) is not None
    if not end.failed and summary is not None and (is_marked or not summary.is_done):
        return _tell(summary, as_json=as_json)
    if end.signals and not list(scratch.glob("error_*.json")):
        name = signal.Signals(end.signals[0]).name
        print(f"potstill train: stopped by {name} before the first step; the same command starts it", file=sys.stderr)
        return INTERRUPTED if end.signals[0] == signal.SIGINT else PREEMPTED
    if end.signals and (preempted := [error for error in read_errors(scratch) if error.preempted]):
        # The other ranks, which waited for this one, only say that they have lost it.
        raise PreemptedError(preempted[0].text)
    print(f"potstill train: error: {_what_failed(end, scratch)}; log: {log_file}", file=sys.stderr)
    return ERROR


def _what_failed(end: RanksEnd, scratch: Path) -> str:
    """The error of the rank that failed first, in its own words if it left any."""
    from potstill.student_train.run.rank_report import main_error, read_errors

    errors = read_errors(scratch)
    told = main_error(errors, len(end.codes))
    if told is not None and any(error.foreseen for error in errors):
        return told
    failed = end.failed[0] if end.failed else None
    if failed is not None and failed not in {error.rank for error in errors}:
        # The errors of the other ranks only say that they have lost this one.
        code = end.codes[failed]
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        why = " (the system does so when memory runs out: see dmesg)" if code == -signal.SIGKILL else ""
        return f"rank {failed} {how}{why} and left no message; the same command continues from the newest checkpoint"
    if told is not None:
        return f"not foreseen: {told}; this is a defect of potstill, please report it with the log"
    return "the ranks ended, but the run left no mark of its end; start the same command again"


def _tell(summary: TrainSummary, *, as_json: bool) -> int:
    print(summary.format())
    _print_json(summary.to_json(), as_json)
    return DONE if summary.is_done else PREEMPTED


def _print_json(value: dict[str, object], wanted: bool) -> None:
    if wanted:
        print(json.dumps(value))


TRAIN = Command(
    name="train",
    summary="train a student, from labels or from targets",
    description="Train or continue the run whose folder is run.output_dir. Everything is checked once, before the "
    "first of the --num-ranks processes starts; --dry-run does the check alone and prints what would be done. "
    "On a cluster start the ranks with any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
    "MASTER_PORT:\n"
    "  deepspeed --hostfile hosts --module potstill.student_train --config run.yaml",
    examples=(
        "potstill train --config run.yaml --num-ranks 8",
        "potstill train --config run.yaml --num-ranks 64 --dry-run",
        "potstill train --preset lm --tokens data/train --model-config configs/small --output runs/small",
        "potstill train --config run.yaml --set optimizer.lr=1e-3 curriculum.0.temperature=2.0",
    ),
    add_arguments=_train_arguments,
    run=_train,
)
