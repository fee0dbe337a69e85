"""The command `demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from potstill.common.exit_codes import DONE
from potstill.launch.command import Command


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path("potstill-demo"), metavar="FOLDER", help="where (default %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: see every stage run in under a minute")
    parser.add_argument("--force", action="store_true", help="delete an earlier demo in that folder and begin again")


def _demo(arguments: argparse.Namespace) -> int:
    from potstill.launch.demo import run_demo
    from potstill.launch.demo_plan import FULL, QUICK

    print(run_demo(arguments.output, QUICK if arguments.quick else FULL, force=arguments.force))
    return DONE


DEMO = Command(
    name="demo",
    summary="the main job on this machine: text to distilled student, in minutes",
    description="Prepare the source of Python's standard library as text, train a small teacher and a smaller language "
    "model, write targets and scores, train one student on labels only and one distilled, and print what came out. "
    "Repeated, it does only what is missing; stopped, it goes on where it was.",
    examples=("potstill demo", "potstill demo --output /data/demo"),
    add_arguments=_demo_arguments,
    run=_demo,
)
