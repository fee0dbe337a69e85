"""`potstill completion`: the script that makes a shell complete commands, flags, presets and files (by shtab)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from potstill.common.exit_codes import DONE
from potstill.launch.command import Command, CommandGroup
from potstill.launch.parser import build_parser
from potstill.launch.presets import list_presets

SHELLS = ("bash", "zsh", "tcsh")
# Where a preset may be named: the flag of train, and the argument of presets.
PRESET_PLACES = {("train", "preset"), ("presets", "name")}
FILES = {"config", "output", "stores", "store", "runs", "tokens", "tokenizer"}  # by name, where no type says it


def completed_parser(commands: Sequence[Command | CommandGroup]) -> argparse.ArgumentParser:
    """The parser with the options of every command, each action marked with what completes its value."""
    import shtab

    presets = [preset.name for preset in list_presets()]
    parser = build_parser(commands, *(command.name for command in commands))
    for name, child in subparsers(parser).items():
        for action in child._actions:
            if (name, action.dest) in PRESET_PLACES:
                action.choices = presets
            elif action.nargs != 0 and action.choices is None and is_place(action):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands by name, those of a group as `group command`."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    found = {name: child for group in groups for name, child in group.choices.items()}
    return found | {f"{name} {inner}": one for name, child in found.items() for inner, one in subparsers(child).items()}


def is_place(action: argparse.Action) -> bool:
    """Whether the value is a file or a folder: by its type, by the key that it sets, or by its name."""
    from pathlib import Path

    return action.type is Path or bool(getattr(action, "is_place", False)) or action.dest in FILES


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell that shall read the script")


def completion_command(others: Sequence[Command | CommandGroup]) -> Command:
    """The command that completes `others` and itself."""

    def complete(arguments: argparse.Namespace) -> int:
        import shtab

        print(shtab.complete(completed_parser([*others, made]), arguments.shell))
        return DONE

    made = Command(
        name="completion",
        summary="print the script that completes commands and flags in bash, zsh or tcsh",
        description="Print a script for the shell: commands, flags, choices, presets and files are then completed with "
        "Tab. Write it once, and again after an update:\n"
        "bash: into ~/.local/share/bash-completion/completions/potstill (or source it in ~/.bashrc)\n"
        "zsh: into a file _potstill of a folder of fpath, e.g. ~/.zfunc (`fpath+=~/.zfunc` before compinit in "
        "~/.zshrc)\n"
        "tcsh: into a file that ~/.tcshrc sources",
        examples=(
            "potstill completion bash > ~/.local/share/bash-completion/completions/potstill",
            "potstill completion zsh > ~/.zfunc/_potstill",
            "potstill completion tcsh > ~/.potstill.tcsh",
        ),
        add_arguments=_completion_arguments,
        run=complete,
    )
    return made
