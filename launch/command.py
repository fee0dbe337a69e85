"""What a sub-command is, and the exit codes that all of them share (the table of them is in commands.py)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

DONE, ERROR, USAGE, INCOMPLETE, PREEMPTED, INTERRUPTED = 0, 1, 2, 3, 75, 130
EXIT_CODES = {
    DONE: "the work is done",
    ERROR: "something must be mended first; the last line on standard error says what",
    USAGE: "the command line is wrong",
    INCOMPLETE: "not everything is done or whole: missing or failed units, damage found, nothing to read",
    PREEMPTED: "saved and stopped before the end, as asked by a signal or a time limit; the same command goes on",
    INTERRUPTED: "interrupted from the keyboard",
}


@dataclass(frozen=True, kw_only=True)
class Command:
    """One sub-command: what it is for, examples for its help, its options, and what it does (returns an exit code)."""

    name: str
    summary: str
    description: str
    examples: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
