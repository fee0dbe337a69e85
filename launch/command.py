"""What a sub-command is, and a group of them (the table of all is in commands.py)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Command:
    """One sub-command: what it is for, examples for its help, its options, and what it does (returns an exit code)."""

    name: str
    summary: str
    description: str
    examples: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


@dataclass(frozen=True, kw_only=True)
class CommandGroup:
    """A name that stands before several commands: `potstill import tokens`, `potstill import targets`."""

    name: str
    summary: str
    description: str
    commands: tuple[Command, ...]

    @property
    def examples(self) -> tuple[str, ...]:
        """Those of its commands."""
        return tuple(example for command in self.commands for example in command.examples)
