"""Parquet and Arrow files (IPC file or stream, folders of save_to_disk), record by record, a few in memory at once."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from potstill.common.errors import UserError
from potstill.teacher_dump.inputs import InputFile
from potstill.teacher_dump.records.base import BadRecord

SUFFIXES = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
_RECORDS_AT_ONCE = 8
_IPC_FILE_MAGIC = b"ARROW1"


def find_tables(entries: Sequence[str]) -> list[InputFile]:
    """The tables that files and folders name: a folder of save_to_disk in its own order, others by name.

    Raises UserError where an entry names none.
    """
    found: list[InputFile] = []
    for entry in expanded(entries):
        path = Path(entry).expanduser()
        if path.is_dir():
            paths = _in_folder(path)
        elif path.is_file() and path.suffix in SUFFIXES:
            paths = [path]
        else:
            raise UserError(
                f"input {entry!r}: expected a {', '.join(SUFFIXES)} file, or a folder with some (found "
                f"{'another file' if path.is_file() else 'nothing'}); check the spelling and --format"
            )
        base = path if path.is_dir() else path.parent
        found += [_input_file(one, one.relative_to(base).as_posix()) for one in paths]
    return found


def expanded(entries: Sequence[str]) -> list[str]:
    """Globs as the paths that they match, in order. Raises UserError where one matches nothing."""
    found: list[str] = []
    for entry in entries:
        paths = sorted(glob.glob(str(Path(entry).expanduser()), recursive=True)) if glob.has_magic(entry) else [entry]
        if not paths:
            raise UserError(f"input {entry!r}: no file matches it; check the spelling")
        found += paths
    return found


def first_columns(entries: Sequence[str]) -> list[str]:
    """Names of the columns of the first table; none where the first entry is no table."""
    path = Path(expanded(entries)[0]).expanduser()
    in_folder = path.is_dir() and (
        (path / "state.json").is_file() or any(one.suffix in SUFFIXES for one in path.rglob("*"))
    )
    if not in_folder and path.suffix not in SUFFIXES:
        return []
    return list(schema_of(find_tables([str(path)])[0]).names)


def _input_file(path: Path, name: str) -> InputFile:
    if not path.is_file():
        raise UserError(f"input {path}: no such file; the data set's state.json names it")
    return InputFile(path, name, SUFFIXES[path.suffix], "", path.stat().st_size)


def _in_folder(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise UserError(f"input {folder} holds several splits; name one of them: {', '.join(splits)}")
    state = folder / "state.json"
    if state.is_file():
        try:
            names = [str(one["filename"]) for one in json.loads(state.read_text())["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"input {state}: not the state.json of save_to_disk ({error!r})") from error
        return [folder / name for name in names]
    paths = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"input folder {folder} holds no {', '.join(SUFFIXES)} file")
    return paths


@dataclass(frozen=True)
class TableRecord:
    """A record's values by column, as Arrow scalars."""

    number: int
    values: Mapping[str, Any]


def schema_of(file: InputFile) -> Any:
    """The Arrow schema. Raises UserError for what is no such file."""
    with _opened(file) as table:
        return table.schema_arrow if file.kind == "parquet" else table.schema


def num_records(file: InputFile) -> int:
    """Records of a file; of Arrow files the bounds of the batches are read, of Parquet files the footer."""
    with _opened(file) as table:
        if file.kind == "parquet":
            return int(table.metadata.num_rows)
        return sum(len(batch) for batch in _arrow_batches(table))


def read_table(file: InputFile, columns: Sequence[str], *, start: int) -> Iterator[TableRecord]:
    """Records from number `start` on. Raises UserError where the file is damaged."""
    with _opened(file) as table:
        batches = (
            _parquet_batches(table, columns, start) if file.kind == "parquet" else _numbered(_arrow_batches(table))
        )
        for first, batch in batches:
            batch.validate(full=True)  # offsets of a damaged file would lead outside its buffers
            arrays = {name: batch.column(name) for name in columns}
            for line in range(max(0, start - first), len(batch)):
                yield TableRecord(first + line, {name: array[line] for name, array in arrays.items()})


@contextmanager
def _opened(file: InputFile) -> Iterator[Any]:
    try:
        if file.kind == "parquet":
            with pq.ParquetFile(file.path) as table:
                yield table
            return
        with pa.memory_map(str(file.path)) as raw:
            is_file = raw.read(len(_IPC_FILE_MAGIC)) == _IPC_FILE_MAGIC
            raw.seek(0)
            yield ipc.open_file(raw) if is_file else ipc.open_stream(raw)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise UserError(f"input file {file.path} cannot be read: {error}") from error


def _parquet_batches(table: Any, columns: Sequence[str], start: int) -> Iterator[tuple[int, Any]]:
    first = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if first + rows > start:
            here = first
            for batch in table.iter_batches(_RECORDS_AT_ONCE, row_groups=[group], columns=list(columns)):
                yield here, batch
                here += len(batch)
        first += rows


def _arrow_batches(table: Any) -> Iterator[Any]:
    if hasattr(table, "num_record_batches"):
        yield from (table.get_batch(number) for number in range(table.num_record_batches))
    else:
        yield from table


def _numbered(batches: Iterator[Any]) -> Iterator[tuple[int, Any]]:
    first = 0
    for batch in batches:
        yield first, batch
        first += len(batch)


def numbers(value: Any, name: str) -> np.ndarray:
    """A list of numbers as an array [n]. Raises BadRecord where it is none, or holds an empty place."""
    items = _items(value, name)
    return _plain(items, name)


def nested_numbers(value: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A list of lists of numbers: their lengths int64 [P], and all numbers in order. Raises BadRecord."""
    outer = _items(value, name)
    if not _is_list(outer.type) or outer.null_count:
        raise BadRecord(f"{name} is not a list of lists at every position (found {outer.type})")
    lengths = pc.list_value_length(outer).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths, _plain(outer.flatten(), name)


def rectangle(value: Any, name: str) -> np.ndarray:
    """A list of lists of one length as a table [P, k]. Raises BadRecord."""
    lengths, flat = nested_numbers(value, name)
    if not len(lengths) or (lengths != lengths[0]).any():
        raise BadRecord(f"{name} has lists of {sorted(set(lengths.tolist()))[:3]} items, expected one length")
    return flat.reshape(len(lengths), int(lengths[0]))


def nested_rectangle(value: Any, name: str) -> np.ndarray:
    """A list of lists of lists, all of one length at each depth, as a table [P, r, k]. Raises BadRecord."""
    outer = _items(value, name)
    if not _is_list(outer.type) or outer.null_count or not len(outer):
        raise BadRecord(f"{name} is not a list of lists of lists (found {outer.type})")
    parts = set(pc.list_value_length(outer).to_pylist())
    inner = outer.flatten()
    if len(parts) != 1 or not _is_list(inner.type) or inner.null_count:
        raise BadRecord(f"{name} has {sorted(parts)[:3]} lists at a position, expected one number of them")
    widths = set(pc.list_value_length(inner).to_pylist())
    if len(widths) != 1:
        raise BadRecord(f"{name} has lists of {sorted(widths)[:3]} items, expected one length")
    return _plain(inner.flatten(), name).reshape(len(outer), parts.pop(), widths.pop())


def _items(value: Any, name: str) -> Any:
    if not _is_list(value.type):
        raise BadRecord(f"{name} is {value.type}, expected a list")
    items = value.values
    if items is None:
        raise BadRecord(f"{name} is empty (null)")
    return items


def _plain(items: Any, name: str) -> np.ndarray:
    if pa.types.is_boolean(items.type):
        items = items.cast(pa.int8())
    if not (pa.types.is_integer(items.type) or pa.types.is_floating(items.type)) or items.null_count:
        found = f"{items.null_count} empty places" if items.null_count else str(items.type)
        raise BadRecord(f"{name} holds {found}, expected numbers")
    plain: np.ndarray = items.to_numpy(zero_copy_only=False)
    return plain


def _is_list(kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
