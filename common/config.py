"""Configuration: YAML file + `a.b=value` overrides -> one strict, frozen pydantic tree.

Unknown and duplicate keys are errors that name the file, the line and the nearest known key. Values of overrides are
read as YAML, so `--set data.files=[a,b]` and `--set alpha=0.5` mean what they say.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from potstill.common.errors import ConfigError
from potstill.common.named_entries import KindIn, annotation_of, table_of
from potstill.common.nearest import nearest_keys


class StrictModel(BaseModel):
    """Base of every configuration tree: unknown keys are refused, values cannot change after they were checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def _place(value: object) -> object:
    return Path(value) if isinstance(value, str) and "://" not in value else value


def _local(value: object) -> object:
    if isinstance(value, str) and "://" in value:
        raise ValueError(f"{value} is a URL; this must be a local path, only stores may be URLs")
    return value


# A path of this machine: a URL would otherwise become a folder of that name.
LocalPath = Annotated[Path, BeforeValidator(_local)]

# A folder, or a URL (s3://, gs://, az://), which stays text because a Path would eat one of its two slashes.
StorePlace = Annotated[Path | str, BeforeValidator(_place)]


def inside(place: Path | str, name: str) -> Path | str:
    """The folder or URL of `name` below `place`."""
    return place / name if isinstance(place, Path) else f"{place.rstrip('/')}/{name}"


Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads `1e-4` as a number, as YAML 1.2 does."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: dict[Hashable, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, Hashable):
            raise ConfigError(f"{key_node.start_mark.name}, line {line}: {key!r} cannot be a key; use a plain word")
        if key in seen:
            raise ConfigError(
                f"{key_node.start_mark.name}, line {line}: key {key!r} stands here a second time "
                f"(first on line {seen[key]}); keep one of them"
            )
        seen[key] = line
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, *, name: str) -> Any:
    """Read YAML text; `name` stands for it in errors. Raises ConfigError on bad syntax or duplicate keys."""
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from error
    finally:
        loader.dispose()


def key_lines(text: str) -> dict[tuple[int | str, ...], int]:
    """Say on which line (from 1) each key of a YAML text stands; list items are keyed by their number."""
    lines: dict[tuple[int | str, ...], int] = {}

    def walk(node: yaml.Node | None, path: tuple[int | str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                here = (*path, str(key_node.value))
                lines[here] = key_node.start_mark.line + 1
                walk(value_node, here)
        elif isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                lines[(*path, number)] = item.start_mark.line + 1
                walk(item, (*path, number))

    walk(yaml.compose(text, Loader=_Loader), ())
    return lines


def _slot(node: Any, name: str, override: str, where: str) -> str | int:
    """The index of `name` in `node`, a group of keys or a list; ConfigError if it can be neither."""
    if isinstance(node, dict):
        return name
    if isinstance(node, list):
        if name.isdigit() and int(name) < len(node):
            return int(name)
        raise ConfigError(
            f"override {override!r}: {where} is a list of {len(node)}; expected an item number below "
            f"{len(node)}, found {name!r}"
        )
    raise ConfigError(f"override {override!r}: {where} is {node!r}, not a group of keys")


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not all(part.strip() for part in path.split(".")):
        raise ConfigError(f"override {override!r}: expected key=value, e.g. optimizer.lr=3e-4")
    *parents, last = path.strip().split(".")
    node: Any = tree
    for depth, name in enumerate(parents):
        slot = _slot(node, name, override, ".".join(parents[:depth]))
        if isinstance(node, dict) and node.get(name) is None:
            node[name] = {}
        node = node[slot]
    node[_slot(node, last, override, ".".join(parents))] = parse_yaml(value, name=f"override {path}")


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> dict[str, str]:
    """Names of the keys that are known at `location` of the tree, as far as the annotations tell: name -> text."""
    current: list[type[BaseModel]] = [model]
    for name in location:
        following: list[type[BaseModel]] = []
        for candidate in current:
            field = candidate.model_fields.get(str(name))
            if field is not None:
                following += _models_in(annotation_of(field))
        current = following or current
    fields = {name: field for candidate in current for name, field in candidate.model_fields.items()}
    return {name: fields[name].description or "" for name in sorted(fields)}


def _elsewhere(model: type[BaseModel], name: str) -> list[str]:
    """Dotted paths of the keys of this name in the whole tree (not inside lists and mappings)."""

    def walk(group: type[BaseModel], prefix: str) -> Iterator[str]:
        for key, field in group.model_fields.items():
            if key == name:
                yield f"{prefix}{key}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from walk(field.annotation, f"{prefix}{key}.")

    return list(walk(model, ""))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    table = table_of(annotation)
    if isinstance(table, KindIn):
        return list(table.models)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]


def _explain(
    error: ValidationError,
    model: type[BaseModel],
    source: str,
    line_of: Mapping[tuple[int | str, ...], int],
) -> str:
    found: dict[tuple[int | str, ...], list[Any]] = {}
    for problem in error.errors():
        found.setdefault(_key_of(model, problem), []).append(problem)
    lines = []
    for place, problems in found.items():
        deeper = any(len(other) > len(place) and other[: len(place)] == place for other in found)
        if deeper and all(problem["type"] in _LOST_BESIDE_DEEPER for problem in problems):
            continue  # the other form of the key does not fit either, or a list counts its bad items out
        key = ".".join(str(part) for part in place)
        where = f"line {line_of[place]}: {key}" if place in line_of else key
        words = " or: ".join(dict.fromkeys(_words(model, place, problem) for problem in problems))
        lines.append(f"  {where}: {words}" if where else f"  {words}")
    return f"{source}: {len(lines)} problem(s) in the configuration\n" + "\n".join(lines)


# A group of keys where a number or text may stand as well, and a list whose only items were refused.
_LOST_BESIDE_DEEPER = ("too_short", "float_type", "int_type", "string_type", "path_type")


def _key_of(model: type[BaseModel], problem: Any) -> tuple[int | str, ...]:
    """Where a problem is, without the names that pydantic gives to the forms of a key (`constrained-int`, ...)."""
    location = problem["loc"]
    annotation: Any = model
    kept: list[int | str] = []
    for number, part in enumerate(location):
        last = number == len(location) - 1
        inner = _inside(annotation, part)
        if inner is not None:
            annotation = inner
        elif not (last and problem["type"] in ("extra_forbidden", "missing")):
            continue
        kept.append(part)
    return tuple(kept)


def _inside(annotation: Any, part: int | str) -> Any | None:
    """Annotation of `part` (a field, an item of a list, a key of a mapping) inside another; None if it is no such."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(part))
        return None if field is None else annotation_of(field)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (list, tuple):
        return arguments[0] if isinstance(part, int) else None
    if origin in (dict, Mapping):
        return arguments[1]
    table = table_of(annotation)
    if isinstance(table, KindIn):
        arguments = table.models
    elif origin is Annotated:
        return _inside(arguments[0], part)
    forms = [form for form in arguments if get_origin(form) not in (dict, Mapping)]  # a mapping's form has any name
    return next((inner for inner in (_inside(form, part) for form in forms) if inner is not None), None)


def _words(model: type[BaseModel], place: tuple[int | str, ...], problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, place[:-1])
        near = nearest_keys(str(place[-1]), known) or _elsewhere(model, str(place[-1]))
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key; {hint}"
    if problem["type"] == "missing":
        return "this key is needed and missing"
    if problem["type"] == "value_error":  # our own words, which say what was found; the input may be the whole tree
        return str(problem["msg"]).removeprefix("Value error, ")
    return f"{problem['msg']} (found {problem.get('input')!r})"


def build_config(
    model: type[Model],
    tree: Mapping[str, Any],
    *,
    source: str,
    line_of: Mapping[tuple[int | str, ...], int] | None = None,
) -> Model:
    """Check a plain tree against `model`. Raises ConfigError with one line per problem.

    `source` stands for the tree in errors; `line_of` (from `key_lines`) adds the line of each key that has one.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, model, source, line_of or {})) from error


def load_config(model: type[Model], path: Path | str | None, overrides: Sequence[str] = ()) -> Model:
    """Read `path` (YAML; None for an empty tree), apply `a.b=value` overrides in order, check against `model`.

    Raises ConfigError: unreadable file, bad YAML, duplicate or unknown key, value out of bounds.
    """
    tree: Any = {}
    line_of: dict[tuple[int | str, ...], int] = {}
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"configuration file {path} cannot be read: {error}") from error
        tree = parse_yaml(text, name=str(path))
        tree = {} if tree is None else tree
        if not isinstance(tree, dict):
            raise ConfigError(
                f"configuration file {path}: expected keys and values at the top, found {type(tree).__name__}"
            )
        line_of = key_lines(text)
    for override in overrides:
        _apply(tree, override)
        given = tuple(override.partition("=")[0].strip().split("."))
        line_of = {key: line for key, line in line_of.items() if tuple(map(str, key[: len(given)])) != given}
    return build_config(model, tree, source=str(path) if path is not None else "options", line_of=line_of)


def dump_config(config: BaseModel) -> str:
    """Write a configuration as YAML that `load_config` reads back to an equal tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
