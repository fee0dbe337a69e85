"""Command `rollout`: a model's own answers. A run stands for the model of its newest checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.common.options import add_config_options, read_config
from potstill.launch.command import Command
from potstill.launch.teacher_commands import TEACHER_FLAGS, WORKER_NOTE, walked

if TYPE_CHECKING:
    from potstill.teacher_dump import RolloutConfig

log = logging.getLogger(__name__)


def _arguments(parser: argparse.ArgumentParser) -> None:
    from potstill.teacher_dump import RolloutConfig

    flags = {f"--{flag}": f"model.{key}" for flag, key in TEACHER_FLAGS.items() if flag != "engine"}
    add_config_options(parser, RolloutConfig, flags=flags | {"--model": "model.model", "--grader": "grader.kind"})


def _rollout(arguments: argparse.Namespace) -> int:
    from potstill.teacher_dump import RolloutConfig, rollout

    config = read_config(RolloutConfig, arguments)
    with model_folder(config) as found:
        return walked(lambda: rollout(found))


@contextlib.contextmanager
def model_folder(config: RolloutConfig) -> Iterator[RolloutConfig]:
    """The settings with a Hugging Face model: where they name a run or a checkpoint, its export in a folder of its own.

    The name of that folder says run and step, so that a later checkpoint is another model to the stores. It is deleted
    on leaving. Raises UserError.
    """
    place = Path(config.model.model)
    if not place.is_dir() or (place / "config.json").is_file():
        yield config  # a model of transformers, or the name of one on the hub
        return
    from potstill.student_train import export
    from potstill.student_train.config.train import ExportConfig
    from potstill.student_train.hf_export.weights import find_source

    source = find_source(place)
    assert source.checkpoint is not None
    with tempfile.TemporaryDirectory(prefix="potstill_rollout_") as folder:
        output = Path(folder) / f"{source.run.resolve().name}-step-{source.checkpoint.step}"
        log.info("%s is a run: its checkpoint of step %d answers, exported for this", place, source.checkpoint.step)
        export(ExportConfig(run=source.checkpoint.folder, output_dir=output, check=False))
        model = config.model.model_copy(update={"model": str(output)})
        yield config.model_copy(update={"model": model})


ROLLOUT = Command(
    name="rollout",
    summary="a model's own answers to prompts: graded, counted, kept",
    description="Let a model answer the prompts of a sealed tokens store with masks: sampled answers, whose share that "
    "passes is the pass rate, and the greedy one. Write OUTPUT/scores (what score gives, and pass rate and grade of "
    "each document), OUTPUT/answers (by row of the input) and OUTPUT/tokens (packed, for a stage to train on). --model "
    f"is a Hugging Face folder, a run, or a checkpoint of one. {WORKER_NOTE}",
    examples=(
        "potstill rollout --tokens data/train --model runs/student --output rollouts --samples 8 --max-new-tokens 64",
        "potstill rollout --tokens data/train --model models/student --output answers --samples 0 --grader rouge_l",
        "potstill rollout --tokens data/train --model models/student --output rollouts --keep passed --grader regex "
        "--set 'grader.pattern=\"#### (-?[0-9]+)\"'",
    ),
    add_arguments=_arguments,
    run=_rollout,
)
