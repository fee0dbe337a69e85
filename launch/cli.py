"""`potstill COMMAND`: one parser, one table of commands, one place where an error becomes a message and an exit code.

Only the command that is asked for fills in its options, and it imports its stage when it runs: `potstill --help` loads
neither torch nor pyarrow.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from potstill.common.entry_point import run_command
from potstill.common.log import setup_logging
from potstill.common.options import parse_arguments
from potstill.launch.commands import COMMANDS
from potstill.launch.parser import build_parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; see `parse_arguments` for what happens if it is wrong."""
    return parse_arguments(build_parser(COMMANDS, *argv[:1]), argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (`EXIT_CODES`)."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    setup_logging()
    return run_command(
        lambda: int(arguments.run(arguments)),
        program=arguments.parser.prog,
        show_traceback=arguments.traceback,
    )


if __name__ == "__main__":
    sys.exit(main())
