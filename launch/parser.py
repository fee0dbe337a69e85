"""The parser of `potstill COMMAND`, made from any table of commands (the whole table is in commands.py)."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import Any

import potstill
from potstill.common.exit_codes import EXIT_CODES
from potstill.common.options import add_traceback_option
from potstill.launch.command import Command, CommandGroup

DESCRIPTION = "Pre-training distillation from offline teacher logits."
EPILOG = """\
the way of the data:
  potstill prepare --input text/ --output data --tokenizer models/teacher --row-length 1024
  potstill dump    --tokens data/train --teacher models/teacher --output targets
  potstill train   --preset distill --tokens data/train --set data.targets.teacher=targets --output runs/student
  potstill export  --run runs/student --output models/student
  potstill eval    --model models/student --heldout data/heldout

the whole of it on this machine, in minutes:
  potstill demo

exit codes:
"""


def build_parser(commands: Sequence[Command | CommandGroup], *filled: str) -> argparse.ArgumentParser:
    """Make the parser. The options of the commands `filled` are there; others have only their name and summary."""
    parser = argparse.ArgumentParser(
        prog="potstill",
        description=DESCRIPTION,
        epilog=EPILOG + "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"potstill {potstill.__version__}")
    children = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for entry in commands:
        _add(children, entry, is_filled=entry.name in filled)
    return parser


def _add(children: Any, entry: Command | CommandGroup, *, is_filled: bool) -> None:
    """Add the parser of a command, or of a group with the parsers of its commands."""
    child = children.add_parser(
        entry.name,
        help=entry.summary,
        description="\n".join(textwrap.fill(line, 100) for line in entry.description.split("\n")),
        epilog="examples:\n" + "\n".join(f"  {example}" for example in entry.examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    child.set_defaults(parser=child)
    if isinstance(entry, CommandGroup):
        if is_filled:
            inner = child.add_subparsers(dest="kind", metavar="KIND", required=True)
            for command in entry.commands:
                _add(inner, command, is_filled=True)
        return
    child.set_defaults(run=entry.run)
    add_traceback_option(child)
    if is_filled:
        entry.add_arguments(child)
