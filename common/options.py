"""Options made from a configuration tree: `--config`, `--set a.b=value`, flags for plain keys, and a list of all keys.

`potstill COMMAND` and the module that launchers start on every rank make their options here, so that one command line
means the same to both.

Everything that is given ends as one list of `a.b=value` overrides in the order of the command line, so that a flag, a
`--set` and a line in a YAML file mean the same and are checked in the same place.
"""

from __future__ import annotations

import argparse
import json
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from potstill.common.config import load_config, parse_yaml
from potstill.common.errors import ConfigError
from potstill.common.named_entries import KindIn, NameIn, annotation_of, table_of
from potstill.common.nearest import nearest_keys

Model = TypeVar("Model", bound=BaseModel)
OVERRIDES = "overrides"  # attribute of the parsed arguments
KEYS = "known_keys"  # attribute of the parsed arguments: every key that --set takes, with its description


@dataclass(frozen=True)
class Key:
    """One key of a configuration tree: dotted path, its annotation, default in words, what it is for."""

    path: str
    annotation: Any
    default: str
    description: str


def list_keys(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Yield every key of a tree in the order of its definition; groups are walked, items of a list are `name.N`.

    A key that may be one of several groups is one key: its type shows the forms (see `type_word`).
    """
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        annotation = annotation_of(field)
        groups = _groups(annotation)
        if len(groups) != 1 or _scalar(annotation) is not None:
            yield Key(path, annotation, _default(field), field.description or "")
            continue
        if field.description:
            yield Key(path, None, "", field.description)
        group, inner = groups[0]
        yield from list_keys(group, f"{path}.{inner}")


def _groups(annotation: Any) -> list[tuple[type[BaseModel], str]]:
    """Models inside an annotation, each with what stands between the key and the model's own keys (`N.` in a list)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, "")]
    origin, arguments, table = get_origin(annotation), get_args(annotation), table_of(annotation)
    if isinstance(table, KindIn):
        return [(model, "") for model in table.models]
    if origin is Annotated:
        return _groups(arguments[0])
    if origin in (list, tuple, Sequence):
        return [(group, f"N.{inner}") for group, inner in _groups(arguments[0])] if arguments else []
    if origin in (dict, Mapping):
        return [(group, f"NAME.{inner}") for group, inner in _groups(arguments[1])]
    if origin in (Union, types.UnionType):
        return [found for argument in arguments for found in _groups(argument)]
    return []


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "" if value is PydanticUndefined else _yaml_word(value)


def _yaml_word(value: Any) -> str:
    if isinstance(value, BaseModel):
        return json.dumps(value.model_dump(mode="json"), default=str)
    if isinstance(value, str | Path):
        return str(value) or "''"
    return json.dumps(value, default=str)


def type_word(annotation: Any) -> str:
    """Say a type as a person would: `int`, `a|b`, `text or null`, `list of number`."""
    origin, arguments, table = get_origin(annotation), get_args(annotation), table_of(annotation)
    if isinstance(table, NameIn):
        return "|".join(table.names)
    if isinstance(table, KindIn):
        return " or ".join(map(type_word, table.models))
    if origin is Annotated:
        return type_word(arguments[0])
    if origin is Literal:
        return "|".join(str(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_word(argument) for argument in arguments))
    if origin in (list, tuple, Sequence):
        return f"list of {type_word(arguments[0])}" if arguments else "list"
    if origin in (dict, Mapping):
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields
        kinds = [f"{name}: {type_word(annotation_of(field))}" for name, field in fields.items() if name == "kind"]
        return "{" + ", ".join([*kinds, *(name for name in fields if name != "kind")]) + "}"
    words = {bool: "true|false", int: "int", float: "number", str: "text", Path: "path", type(None): "null"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)).lower())


@dataclass(frozen=True)
class _Scalar:
    """How a plain key is read from a flag."""

    kind: type
    many: bool = False
    choices: tuple[str, ...] | None = None


def _scalar(annotation: Any) -> _Scalar | None:
    """The scalar behind an annotation (through `| None`, `Annotated`, one list), or None if a flag cannot say it."""
    origin, arguments, table = get_origin(annotation), get_args(annotation), table_of(annotation)
    if isinstance(table, NameIn):
        return _Scalar(str, choices=table.names)
    if origin is Annotated:
        return _scalar(arguments[0])
    if origin is Literal and all(isinstance(argument, str) for argument in arguments):
        return _Scalar(str, choices=arguments)
    if origin in (Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        if len(inner) == 1:
            return _scalar(inner[0])
        bare = [get_args(argument)[0] if get_origin(argument) is Annotated else argument for argument in inner]
        if str in bare or Path in bare:
            return _Scalar(str)  # a path or a word; the other forms (a mapping) need a file or --set
        return None
    if origin in (list, tuple, Sequence) and arguments and arguments[1:] in ((), (Ellipsis,)):
        item = _scalar(arguments[0])
        return None if item is None or item.many else _Scalar(item.kind, many=True, choices=item.choices)
    if annotation is Path:
        return _Scalar(str)
    return _Scalar(annotation) if annotation in (bool, int, float, str) else None


class _Override(argparse.Action):
    """Append `path=value` to the overrides; the path is in `const`, None for a ready-made `--set`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = list(getattr(namespace, OVERRIDES, None) or [])
        if self.const is None:
            given += values
        elif self.nargs == 0:
            given.append(f"{self.const}={'false' if str(option_string).startswith('--no-') else 'true'}")
        elif self.nargs == "+":
            given.append(f"{self.const}={json.dumps([*_list_so_far(given, self.const), *values], ensure_ascii=False)}")
        else:
            given.append(f"{self.const}={json.dumps(values, ensure_ascii=False)}")
        setattr(namespace, OVERRIDES, given)


def _list_so_far(given: Sequence[str], path: str) -> list[Any]:
    """The list that the command line has given for a key so far: `--input a --input b` is `--input a b`."""
    last = next((override for override in reversed(given) if override.startswith(f"{path}=")), None)
    try:
        found = [] if last is None else parse_yaml(last.partition("=")[2], name=f"override {path}")
    except ConfigError:
        return []  # of a --set, which is refused when the tree is read
    return found if isinstance(found, list) else []


def add_config_options(
    parser: argparse.ArgumentParser, model: type[BaseModel], *, flags: Mapping[str, str] | None = None
) -> None:
    """Add `--config`, `--set` and flags for the plain keys at the top of `model`; list all keys below the help.

    `flags` adds more of them for keys deeper in the tree: {"--steps": "run.max_steps"}. A flag that the parser has
    already keeps its meaning.
    """
    parser.set_defaults(**{OVERRIDES: []})
    parser.add_argument("--config", metavar="FILE", help="YAML file with the keys listed below")
    parser.add_argument(
        "--set",
        dest=OVERRIDES,
        action=_Override,
        nargs="+",
        metavar="KEY=VALUE",
        help="set any key listed below; comes after the file, in the order given",
    )
    keys = {key.path: key for key in list_keys(model)}
    parser.set_defaults(**{KEYS: {path: key.description for path, key in keys.items() if key.annotation is not None}})
    wanted = {f"--{path.replace('_', '-')}": path for path in keys if "." not in path} | dict(flags or {})
    group = parser.add_argument_group("keys as flags")
    for flag, path in wanted.items():
        scalar = _scalar(keys[path].annotation)
        if flag not in (flags or {}) and (scalar is None or flag in parser._option_string_actions):
            continue
        assert scalar is not None, f"{path} cannot be a flag"
        text = keys[path].description.replace("%", "%%")
        common: dict[str, Any] = {"dest": OVERRIDES, "action": _Override, "const": path, "help": text}
        if scalar.kind is bool:
            group.add_argument(flag, f"--no-{flag[2:]}", nargs=0, **common)
        else:
            metavar = None if scalar.choices else flag[2:].replace("-", "_").upper()
            common["nargs"] = "+" if scalar.many else None
            made = group.add_argument(flag, type=scalar.kind, choices=scalar.choices, metavar=metavar, **common)
            made.is_place = "path" in type_word(keys[path].annotation)  # type: ignore[attr-defined] # for completion
    parser.epilog = f"{parser.epilog or ''}\n\n{describe_keys(keys.values())}".lstrip("\n")


def describe_keys(keys: Any) -> str:
    """List keys with type, default and description, for the end of a help text."""
    lines = ["keys of the configuration (in the file, or --set KEY=VALUE):"]
    for key in keys:
        if key.annotation is None:
            lines.append(f"  {key.path}:")
        else:
            default = (
                f", {key.default}" if key.default == "needed" else f", default {key.default}" if key.default else ""
            )
            lines.append(f"  {key.path} ({type_word(key.annotation)}{default})")
        lines += textwrap.wrap(key.description, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def explain_unknown(words: Sequence[str], *, flags: Mapping[str, Sequence[str]], keys: Mapping[str, str]) -> str:
    """One sentence for each unknown flag of a command line: the flag or key that it may mean.

    `words` is what argparse did not know, `flags` the known ones (`--steps` -> key it sets and help text), `keys`
    those that `--set` takes (dotted path -> description).
    """
    told = []
    for number, word in enumerate(words):
        if not word.startswith("--"):
            continue
        name, equals, value = word.partition("=")
        if not equals and words[number + 1 : number + 2] and not words[number + 1].startswith("-"):
            value = words[number + 1]
        hints = list(_hints(name[2:].replace("-", "_"), value or "VALUE", flags=flags, keys=keys))
        told.append(f"there is no {name} here; " + (f"use {' or '.join(hints)}" if hints else "--help lists all flags"))
    return "; ".join(told) or f"unexpected: {' '.join(words)}"


def _hints(
    name: str, value: str, *, flags: Mapping[str, Sequence[str]], keys: Mapping[str, str], count: int = 3
) -> Iterable[str]:
    """What to write for a flag `name`: a key of that very name, else the nearest flag or key."""
    by_path = {path: flag for flag, (path, _) in flags.items()}
    paths = [path for path in keys if path.rpartition(".")[2] == name and "NAME" not in path]
    if not paths:
        described = {path.rpartition(".")[2]: text for path, text in reversed(list(keys.items()))}
        known = described | {flag[2:].replace("-", "_"): text for flag, (_, text) in flags.items()}
        for near in nearest_keys(name, known):
            flag = f"--{near.replace('_', '-')}"
            if flag in flags:
                return [flag]
            paths = [path for path in keys if path.rpartition(".")[2] == near and "NAME" not in path]
    paths.sort(key=lambda path: (".N." in path, path.count(".")))
    return [by_path.get(path) or f"--set {path.replace('.N.', '.0.')}={value}" for path in paths[:count]]


def read_config(model: type[Model], arguments: argparse.Namespace) -> Model:
    """Build the checked tree from `--config` and all overrides. Raises ConfigError."""
    return load_config(model, arguments.config, getattr(arguments, OVERRIDES))


def parse_arguments(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line (None: this process's); leaves the program with code 2 and a usage line if it is wrong.

    What is not known is explained by the flag or key that is nearest to it. `parser` may have sub-parsers, each of
    which leaves itself in the attribute `parser` of what it parsed.
    """
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        asked: argparse.ArgumentParser = getattr(arguments, "parser", parser)
        actions = asked._option_string_actions.items()
        flags = {flag: (action.const, action.help or "") for flag, action in actions if flag.startswith("--")}
        asked.error(explain_unknown(unknown, flags=flags, keys=getattr(arguments, KEYS, {})))
    return arguments


def add_traceback_option(parser: argparse.ArgumentParser) -> None:
    """Add `--traceback`, whose value goes to `run_command`."""
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
