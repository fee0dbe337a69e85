"""Options of a training run, the same for `potstill train` and for the module that launchers start on every rank."""

from __future__ import annotations

import argparse

from potstill.common.options import add_config_options
from potstill.student_train.config.train import TrainConfig

# Flags for keys below the top of the tree.
FLAGS = {
    "--output": "run.output_dir",
    "--steps": "run.max_steps",
    "--seed": "run.seed",
    "--model-config": "model.config",
    "--model": "model.path",
    "--tokens": "data.tokens",
    "--heldout": "data.heldout",
    "--force": "run.force",
}


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Add `--config`, `--set` and the flags of a run; `read_config(TrainConfig, ...)` reads them."""
    add_config_options(parser, TrainConfig, flags=FLAGS)
