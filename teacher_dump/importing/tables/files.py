"""Which Parquet and Arrow files an input names: files, patterns, folders, the shards of save_to_disk."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.common.errors import UserError
from potstill.teacher_dump.importing.globs import expanded
from potstill.teacher_dump.importing.tables.reading import read_schema
from potstill.teacher_dump.inputs import InputFile

log = logging.getLogger(__name__)

SUFFIXES = (".parquet", ".arrow", ".feather")
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"


def find_tables(entries: Sequence[str]) -> list[InputFile]:
    """The tables that files and folders name: a folder of save_to_disk in its own order, others by name.

    A file named twice is read once. Raises UserError where an entry names none.
    """
    found: list[InputFile] = []
    seen: set[Path] = set()
    for entry in expanded(entries):
        path = Path(entry).expanduser()
        if path.is_dir():
            paths = tables_in(path)
            if not paths:
                raise UserError(f"input folder {path} holds no {', '.join(SUFFIXES)} file")
        elif path.is_file() and path.suffix in SUFFIXES:
            paths = [path]
        else:
            raise UserError(
                f"input {entry!r}: expected a {', '.join(SUFFIXES)} file, or a folder with some (found "
                f"{'another file' if path.is_file() else 'nothing'}); check the spelling and --format"
            )
        base = path if path.is_dir() else path.parent
        for one in paths:
            if one.resolve() in seen:
                log.info("input %s is named twice and read once", one)
                continue
            seen.add(one.resolve())
            name = one.relative_to(base).as_posix()
            found.append(InputFile(one, name, one.suffix.removeprefix("."), "", one.stat().st_size))
    return found


def first_columns(entries: Sequence[str]) -> list[str]:
    """Names of the columns of the first table; none where the first entry is no table."""
    path = Path(expanded(entries)[0]).expanduser()
    tables = tables_in(path) if path.is_dir() else [path] if path.suffix in SUFFIXES and path.is_file() else []
    return list(read_schema(tables[0]).names) if tables else []


def tables_in(folder: Path) -> list[Path]:
    """The tables of a folder, searched to the bottom, hidden files left out. Raises UserError as `saved_shards`."""
    shards = saved_shards(folder)
    if shards is not None:
        return shards
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            found += tables_in(path)
        elif path.suffix in SUFFIXES:
            found.append(path)
    return found


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote this folder."""
    return (folder / _SAVED).is_file()


def saved_shards(folder: Path) -> list[Path] | None:
    """The files of a folder of save_to_disk, in its own order; None where it is another folder.

    Beside them lie files of a cache, which hold the same records again. Raises UserError where the folder holds several
    splits, and where one of its files is missing.
    """
    if (folder / _SAVED_SPLITS).is_file():
        splits = _json(folder / _SAVED_SPLITS).get("splits")
        raise UserError(
            f"input folder {folder} is a data set of several splits {splits}; name the folder of one of them"
        )
    if not is_saved(folder):
        return None
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
