"""Which files of tokens an input names, in which order, and of which format each is."""

from __future__ import annotations

import glob
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.common.errors import UserError
from potstill.teacher_dump.importing.token_formats import TOKEN_FORMATS

log = logging.getLogger(__name__)

_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class FoundFile:
    """One file to open; `name` is its place below the input entry, so that a corpus may be moved between runs."""

    path: Path
    name: str
    format: str


def find_token_files(entries: Sequence[str], wanted: str | None) -> list[FoundFile]:
    """Files named by paths, prefixes of .bin/.idx, folders (searched to the bottom) and globs; `wanted`: their format.

    Order: entries as given, inside an entry by path, the shards of a folder of save_to_disk as that lists them. A file
    named twice is read once. Raises UserError when an entry names nothing, or files of several formats.
    """
    files: list[FoundFile] = []
    seen: set[Path] = set()
    for entry in entries:
        found = list(_expand(entry, wanted))
        if not found:
            raise UserError(
                f"input {entry!r}: no such file, prefix or folder, and no file matches it; check the spelling"
            )
        for file in found:
            real = file.path.resolve()
            if real in seen:
                log.info("input %s is named twice and read once", file.path)
                continue
            seen.add(real)
            files.append(file)
    formats = Counter(file.format for file in files)
    if len(formats) > 1:
        counts = ", ".join(f"{count} of {name}" for name, count in formats.items())
        raise UserError(
            f"input {list(entries)} names files of several formats ({counts}); name one by --format, and import the "
            "others into an output of their own"
        )
    return files


def _expand(entry: str, wanted: str | None) -> Iterator[FoundFile]:
    path = Path(entry).expanduser()
    if path.is_file():
        yield _named(path, wanted)
    elif path.is_dir():
        found = list(_in_folder(path, path, wanted))
        if not found:
            kinds = [end for name in ([wanted] if wanted else TOKEN_FORMATS) for end in TOKEN_FORMATS[name].suffixes]
            raise UserError(
                f"input folder {path} holds no {', '.join(kinds)} file; name files by a glob, with --format"
            )
        yield from found
    elif wanted in (None, "megatron") and _pair(path) is not None:
        yield FoundFile(_idx(path), path.name, "megatron")
    elif glob.has_magic(entry):
        fixed = next((Path(*path.parts[:n]) for n, part in enumerate(path.parts) if glob.has_magic(part)), path.parent)
        for name in sorted(glob.glob(str(path), recursive=True)):
            one = Path(name)
            if one.is_dir() and (one / _SAVED).is_file() and wanted in (None, "table"):
                yield from _in_folder(one, fixed, wanted)
            elif one.is_file() and not _is_beside(one):
                yield _named(one, wanted, fixed)


def _named(path: Path, wanted: str | None, below: Path | None = None) -> FoundFile:
    """A file that was named, or matched by a glob. Raises UserError where nothing tells its format."""
    found = wanted or _format(path)
    if found is None:
        owner = next((name for name, entry in TOKEN_FORMATS.items() if path.name.endswith(entry.beside)), None)
        advice = f"it belongs to a file of format {owner}: name that one" if owner else "name its format (--format)"
        raise UserError(f"input {path}: its name does not tell what it holds; {advice}")
    name = path.relative_to(below).as_posix() if below is not None else path.name
    if found == "megatron":
        if _pair(path.with_suffix("")) is None:
            raise UserError(
                f"input {path}: a Megatron data set is a .bin and an .idx of one name; one of them is missing"
            )
        return FoundFile(_idx(path.with_suffix("")), name.rpartition(".")[0] or name, found)
    return FoundFile(path, name, found)


def _in_folder(folder: Path, root: Path, wanted: str | None) -> Iterator[FoundFile]:
    if (folder / _SAVED_SPLITS).is_file() and wanted in (None, "table"):
        splits = _json(folder / _SAVED_SPLITS).get("splits")
        raise UserError(
            f"input folder {folder} is a data set of several splits {splits}; name the folder of one of them"
        )
    if (folder / _SAVED).is_file() and wanted in (None, "table"):
        # Beside the shards lie files of a cache, which hold the same records again.
        for shard in _shards(folder):
            yield FoundFile(shard, shard.relative_to(root).as_posix(), "table")
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _in_folder(path, root, wanted)
        elif path.is_file() and _is_wanted(path, wanted):
            yield _named(path, wanted, root)


def _is_wanted(path: Path, wanted: str | None) -> bool:
    """Whether a file that nobody has named is taken: by the end of its name."""
    if wanted is not None:
        return path.name.endswith(TOKEN_FORMATS[wanted].suffixes)
    return not _is_beside(path) and _format(path) is not None


def _shards(folder: Path) -> list[Path]:
    try:
        paths = [folder / str(entry["filename"]) for entry in list(_json(folder / _SAVED)["_data_files"])]
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / _SAVED} does not list the data files; save the data set again") from error
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"data set {folder}: its file {path} does not exist; restore it, or save the data set again"
            )
    return paths


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; save the data set again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, expected an object; save the data set again")
    return value


def _format(path: Path) -> str | None:
    """The format that a file's name tells."""
    if path.suffix == ".bin" and _pair(path.with_suffix("")) is not None:
        return "megatron"
    return next((name for name, entry in TOKEN_FORMATS.items() if path.name.endswith(entry.suffixes)), None)


def _is_beside(path: Path) -> bool:
    """Whether a file is no input by itself: the .bin of a pair is found by its .idx."""
    if path.suffix == ".bin":
        return _pair(path.with_suffix("")) is not None
    return _format(path) is None and any(path.name.endswith(entry.beside) for entry in TOKEN_FORMATS.values())


def _idx(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.idx")


def _pair(prefix: Path) -> Path | None:
    """The prefix itself where a .bin and an .idx of that name are there."""
    both = all(prefix.with_name(f"{prefix.name}{end}").is_file() for end in (".bin", ".idx"))
    return prefix if both else None
