"""The options of `potstill inspect` that name a run or a student (what they do is in inspect_student.py)."""

from __future__ import annotations

import argparse
from pathlib import Path

FLAGS = {"run": "run_folder", "config": "config", "step": "step", "model": "model"}  # and where their values stand


def add_student_arguments(parser: argparse.ArgumentParser) -> None:
    """--run, --config, --step and --model."""
    parser.add_argument(
        "--run",
        dest=FLAGS["run"],  # `run` is what a command does
        type=Path,
        metavar="RUN",
        help="with --html: what a step of this run keeps, and the loss of its newest checkpoint",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="with --html: what a step of this training configuration keeps"
    )
    parser.add_argument(
        "--step",
        metavar="N",
        help="step for --run (default: its last one) or --config (default 0); 0.5 for half of the run",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="with --html: loss of this model (a Hugging Face folder, a checkpoint, a run) instead of the run's",
    )
