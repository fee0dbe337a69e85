"""`potstill COMMAND`: one parser, one table of commands, one place where an error becomes a message and an exit code.

Only the command that is asked for fills in its options, and it imports its stage when it runs: `potstill --help` loads
neither torch nor pyarrow.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence

import potstill
from potstill.common.errors import UserError
from potstill.common.exit_codes import DONE, ERROR, EXIT_CODES, INTERRUPTED
from potstill.common.log import setup_logging
from potstill.launch.commands import COMMANDS
from potstill.launch.options import KEYS, explain_unknown

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
# Errors of the rooms below that a person can correct; only a module that is loaded can have raised one.
EXPECTED_ERRORS = (
    ("potstill.storage.errors", "StoreError"),
    ("potstill.kernels.types", "SelfCheckError"),
    ("potstill.student_train.run.step_watch", "LossNotFiniteError"),
)


def build_parser(*filled: str) -> argparse.ArgumentParser:
    """Make the parser. The options of the commands `filled` are there; others have only their name and summary."""
    parser = argparse.ArgumentParser(
        prog="potstill",
        description=DESCRIPTION,
        epilog=EPILOG + "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"potstill {potstill.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for entry in COMMANDS:
        child = commands.add_parser(
            entry.name,
            help=entry.summary,
            description="\n".join(textwrap.fill(line, 100) for line in entry.description.split("\n")),
            epilog="examples:\n" + "\n".join(f"  {example}" for example in entry.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        child.set_defaults(run=entry.run, parser=child)
        child.add_argument("--traceback", action="store_true", help="show where an error came from")
        if entry.name in filled:
            entry.add_arguments(child)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; leaves the program with code 2 and a usage line if it is wrong.

    What is not known is explained by the flag or key that is nearest to it.
    """
    arguments, unknown = build_parser(*argv[:1]).parse_known_args(argv)
    if unknown:
        actions = arguments.parser._option_string_actions.items()
        flags = {flag: (action.const, action.help or "") for flag, action in actions if flag.startswith("--")}
        arguments.parser.error(explain_unknown(unknown, flags=flags, keys=getattr(arguments, KEYS, {})))
    return arguments


def is_expected(error: Exception) -> bool:
    """Whether the text of the error is for the person at the terminal, not for a developer."""
    kinds = [getattr(sys.modules[module], name, None) for module, name in EXPECTED_ERRORS if module in sys.modules]
    return isinstance(error, (UserError, OSError, *filter(None, kinds)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (`EXIT_CODES`)."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    setup_logging()
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of a pipe (`potstill inspect ... | head`) has what it wants; the interpreter may not flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        print(f"potstill {arguments.command}: interrupted; the same command continues from here", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if arguments.traceback or not is_expected(error):
            traceback.print_exc()
        text = str(error) or type(error).__name__
        if not is_expected(error):
            text = f"not foreseen: {type(error).__name__}: {text}; this is a defect of potstill, please report it"
        print(f"potstill {arguments.command}: error: {text}", file=sys.stderr)
        return ERROR
    return code


if __name__ == "__main__":
    sys.exit(main())
