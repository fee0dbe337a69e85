"""The command `demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from potstill.common.errors import ConfigError
from potstill.common.exit_codes import DONE
from potstill.launch.command import Command


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path("potstill-demo"), metavar="FOLDER", help="where (default %(default)s)"
    )
    noise = parser.add_mutually_exclusive_group()
    noise.add_argument(
        "--noise",
        type=float,
        metavar="SHARE",
        help="share of the training text's passages replaced by noise, 0 to 1 (default 0.4); held-out text stays clean",
    )
    noise.add_argument("--no-noise", dest="noise", action="store_const", const=0.0, help="the same as --noise 0")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: see every stage run in under a minute")
    parser.add_argument("--force", action="store_true", help="delete an earlier demo in that folder and begin again")


def _demo(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from potstill.launch.demo.run import run_demo
    from potstill.launch.demo.sizes import FULL, QUICK

    size = QUICK if arguments.quick else FULL
    if arguments.noise is not None:
        if not 0 <= arguments.noise <= 1:
            raise ConfigError(f"--noise {arguments.noise}: expected a share of the passages, 0 to 1")
        size = replace(size, noise=arguments.noise)
    print(run_demo(arguments.output, size, force=arguments.force))
    return DONE


DEMO = Command(
    name="demo",
    summary="the main job on this machine: text to distilled students, in minutes",
    description="Prepare the source of Python's standard library as text, part of it replaced by noise as crawled text "
    "has it (--no-noise leaves it clean), train a small teacher and a smaller language model, write targets and "
    "scores, train three students on labels only, three by plain distillation and three with a selector of rows, and "
    "print means and spreads on clean held-out text. Repeated, it does only what is missing; stopped, it continues "
    "where it was.",
    examples=("potstill demo", "potstill demo --no-noise --output /data/demo"),
    add_arguments=_demo_arguments,
    run=_demo,
)
