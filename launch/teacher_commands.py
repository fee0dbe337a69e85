"""Commands of the teacher stage: prepare, dump, score."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from potstill.common.errors import ConfigError
from potstill.common.exit_codes import DONE, INCOMPLETE, PREEMPTED
from potstill.common.options import add_config_options, read_config
from potstill.common.processes import die_with_torchrun
from potstill.launch.command import Command
from potstill.launch.on_ray.options import RayOptions, add_ray_options, read_ray_options

if TYPE_CHECKING:
    from potstill.teacher_dump.config import DumpConfig
    from potstill.teacher_dump.job import WorkerSummary
    from potstill.teacher_dump.left_out import RowsOf
    from potstill.teacher_dump.rollouts.run import RolloutSummary
    from potstill.teacher_dump.series import SeriesSummary

log = logging.getLogger("potstill.launch.dump")
WORKER_NOTE = (
    "Any number of workers may run at once, on any machines that see the folder; each takes its share of the units "
    "first. Started again, with any number of workers, only units without a record are done. Without --worker the "
    "place comes from RANK and WORLD_SIZE, if a launcher set them."
)


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    from potstill.teacher_dump.config import PrepareConfig

    flags = {f"--dataset-{key}": f"dataset.{key}" for key in ("config", "split", "revision")}
    flags |= {"--dataset": "dataset.path", "--vocab-size": "train_tokenizer.vocab_size"}
    add_config_options(parser, PrepareConfig, flags=flags)


def _prepare(arguments: argparse.Namespace) -> int:
    from potstill.teacher_dump import prepare
    from potstill.teacher_dump.config import PrepareConfig

    print(prepare(read_config(PrepareConfig, arguments)).format())
    return DONE


PREPARE = Command(
    name="prepare",
    summary="text to rows of tokens",
    description="Read text (.txt, .jsonl, .jsonl.gz/.zst/.xz, .parquet; files, folders or globs) or a Hugging Face "
    "data set (--dataset: a folder of save_to_disk, a folder with data files, a hub name), tokenize it, pack it "
    "into rows with the bounds of the documents, and write the stores OUTPUT/train and OUTPUT/heldout. A record is a "
    "text (--text-field), a prompt with its response (--prompt-field, --response-field), or a conversation through the "
    "tokenizer's chat template (--messages-field); of the last two the responses are trained on.",
    examples=(
        "potstill prepare --input books/ --output data --tokenizer models/teacher --row-length 1024 "
        "--heldout-fraction 0.01",
        "potstill prepare --input 'web/*.parquet' --text-field content --output data --vocab-size 32000",
        "potstill prepare --input maths.jsonl --prompt-field question --response-field answer "
        "--response-format ' {response}' --packing whole --output data --tokenizer models/teacher",
        "potstill prepare --input chats.jsonl --messages-field messages --packing whole --output data "
        "--tokenizer models/teacher-instruct",
        "potstill prepare --dataset HuggingFaceFW/fineweb --dataset-config sample-10BT --dataset-split train "
        "--output data --tokenizer models/teacher",
    ),
    add_arguments=_prepare_arguments,
    run=_prepare,
)


def walked(work: Callable[[], WorkerSummary | SeriesSummary | RolloutSummary]) -> int:
    """Run a worker and say how its part of the work stands: one of several answers for its own share only."""
    from potstill.teacher_dump.job import StoppedError

    die_with_torchrun()
    try:
        summary = work()
    except StoppedError as error:
        print(error, file=sys.stderr)
        return PREEMPTED
    print(summary.format())
    return INCOMPLETE if summary.num_missing and summary.num_workers == 1 else DONE


TEACHER_FLAGS = {"batch-rows": "batch_rows", "dtype": "dtype", "engine": "engine", "device": "device"}


def _dump_arguments(parser: argparse.ArgumentParser) -> None:
    from potstill.teacher_dump.config import DumpConfig

    flags = {f"--{flag}": f"teacher.{key}" for flag, key in TEACHER_FLAGS.items()}
    flags |= {"--teacher": "teacher.model", "--mode": "selection.mode", "--k": "selection.k", "--p": "selection.p"}
    parser.add_argument(
        "--only-rows-of",
        metavar="RUN.yaml",
        help="configuration of a training run: dump only the rows that it will read of this store, which its "
        "data.targets names at OUTPUT (checkpoints: at OUTPUT/NAME)",
    )
    parser.add_argument(
        "--as", dest="store_name", metavar="NAME", help="with --only-rows-of: name of the store in data.targets"
    )
    add_ray_options(parser)
    add_config_options(parser, DumpConfig, flags=flags)


def _dump(arguments: argparse.Namespace) -> int:
    from potstill.teacher_dump import dump
    from potstill.teacher_dump.config import DumpConfig

    config = read_config(DumpConfig, arguments)
    only_rows = None if arguments.only_rows_of is None and arguments.store_name is None else _rows_of(arguments, config)
    ray_options = read_ray_options(arguments)
    if ray_options is None:
        return walked(lambda: dump(config, only_rows=only_rows))
    return walked(lambda: _dump_on_ray(config, only_rows, ray_options))


def _dump_on_ray(config: DumpConfig, only_rows: RowsOf | None, options: RayOptions) -> WorkerSummary | SeriesSummary:
    from functools import partial

    from potstill.launch.on_ray.cluster import Cluster
    from potstill.launch.on_ray.driver import run_on_ray
    from potstill.teacher_dump import dump

    with Cluster(options) as cluster:
        return dump(config, only_rows=only_rows, runner=partial(run_on_ray, cluster))


def _rows_of(arguments: argparse.Namespace, config: DumpConfig) -> RowsOf:
    """The rows that a run will read of each store that this dump writes; all is checked before a model is loaded."""
    from potstill.common.config import load_config
    from potstill.student_train.config.train import TrainConfig
    from potstill.student_train.data.rows_read import rows_to_dump
    from potstill.teacher_dump.series import series_configs

    name = arguments.store_name
    if arguments.only_rows_of is None:
        raise ConfigError("--as names a store of the run that --only-rows-of gives; give that too")
    if name is not None and config.teacher.checkpoints:
        raise ConfigError("--as is for one store; each checkpoint's is found at OUTPUT/NAME in data.targets")
    run = load_config(TrainConfig, arguments.only_rows_of)
    members = series_configs(config) if config.teacher.checkpoints else [config]
    rows = {one.output: rows_to_dump(run, output=one.output, tokens=one.tokens, name=name) for one in members}
    for output, found in rows.items():
        log.info("%s: the run of %s reads %d rows of it", output, arguments.only_rows_of, len(found))
    return lambda member: rows[member.output]


DUMP = Command(
    name="dump",
    summary="teacher over the rows: truncated distributions into a store",
    description="Run the teacher over a sealed tokens store and write, for every token, the kept entries of its "
    f"distribution, the mass outside, the entropy, and the label's probability and rank. {WORKER_NOTE}",
    examples=(
        "potstill dump --tokens data/train --teacher models/teacher --output data/targets",
        "potstill dump --tokens data/train --teacher models/teacher --output data/targets --k 64 --p 0.98 "
        "--temperatures 2.0 --worker 3 --num-workers 8",
        "potstill dump --tokens data/train --teacher runs/teacher/exports --set 'teacher.checkpoints=[step_1000, "
        "step_8000]' --output data/series --only-rows-of student.yaml",
    ),
    add_arguments=_dump_arguments,
    run=_dump,
)


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    from potstill.teacher_dump.config import ScoreConfig

    flags = {f"--{flag}": f"model.{key}" for flag, key in TEACHER_FLAGS.items()} | {"--slm": "model.model"}
    add_config_options(parser, ScoreConfig, flags=flags)


def _score(arguments: argparse.Namespace) -> int:
    from potstill.teacher_dump import score
    from potstill.teacher_dump.config import ScoreConfig

    config = read_config(ScoreConfig, arguments)
    return walked(lambda: score(config))


SCORE = Command(
    name="score",
    summary="small model over the rows: losses and ranks that a selector can use",
    description="Run a small language model over a sealed tokens store and write, for every token, the probability and "
    f"rank of the label and the entropy, and statistics for every row. {WORKER_NOTE}",
    examples=("potstill score --tokens data/train --slm models/small --output data/scores",),
    add_arguments=_score_arguments,
    run=_score,
)
