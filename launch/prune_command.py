"""`potstill prune`: a smaller model out of a teacher's own weights, for a student to start from."""

from __future__ import annotations

import argparse

from potstill.common.exit_codes import DONE
from potstill.common.options import add_config_options, read_config
from potstill.launch.command import Command


def _arguments(parser: argparse.ArgumentParser) -> None:
    from potstill.student_train.config.prune import PruneConfig

    add_config_options(parser, PruneConfig, flags={"--output": "output_dir"})


def _prune(arguments: argparse.Namespace) -> int:
    from potstill.student_train import prune
    from potstill.student_train.config.prune import PruneConfig

    print(prune(read_config(PruneConfig, arguments)).format())
    return DONE


PRUNE = Command(
    name="prune",
    summary="a student's start: the teacher's own weights, cut to a smaller size",
    description="Measure on some rows which channels, neurons, heads and layers of a model matter, keep as many as "
    "asked for, and write a Hugging Face folder that a student starts from (model.path, preset pruned). Forward passes "
    "only. For llama, mistral, qwen2 and qwen3 models.",
    examples=(
        "potstill prune --model models/teacher --tokens data/train --output models/start --hidden-size 2048 "
        "--intermediate-size 5632",
        "potstill prune --model models/teacher --tokens data/train --output models/start --num-layers 16 "
        "--depth-by loss",
    ),
    add_arguments=_arguments,
    run=_prune,
)
