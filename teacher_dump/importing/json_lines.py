"""JSON lines with a list of ids, plain or compressed: `{"input_ids": [5, 17, 0]}`, one object a line."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potstill.common.errors import UserError
from potstill.teacher_dump.documents import lines_of
from potstill.teacher_dump.importing.columns import Columns, choose_columns, make_record
from potstill.teacher_dump.importing.token_file import Ids, Reading, TokenFile, TokenRecord
from potstill.teacher_dump.inputs import COMPRESSIONS, InputFile
from potstill.teacher_dump.records.base import BadRecord


@dataclass(frozen=True)
class JsonLines:
    """A TokenFile over JSON lines; the keys of the first object say which columns there are."""

    paths: tuple[Path, ...]
    columns: Columns
    reading: Reading
    facts: Mapping[str, Any]
    hints: tuple[str, ...]
    word: str = "line"

    @property
    def has_mask(self) -> bool:
        return self.columns.mask is not None

    def records(self, skip: int) -> Iterator[TokenRecord]:
        """The lines from number `skip` on, without those that are blank."""
        for number, line, position in _lines(self.paths[0]):
            if number < skip or not line.strip():
                continue
            found = _object(line)
            if isinstance(found, BadRecord):
                yield TokenRecord(number, found, position)
                continue
            names = {"ids": self.columns.ids, "flags": self.columns.mask, "attention": self.columns.attention}
            values = {key: _numbers(found, name, key) for key, name in names.items() if name is not None}
            yield make_record(number, position, self.columns, self.reading, **values)


def open_file(path: Path, reading: Reading) -> TokenFile:
    """Open a file of JSON lines. Raises UserError where its first object has no list of ids."""
    for number, line, _ in _lines(path):
        found = _object(line) if line.strip() else None
        if isinstance(found, dict):
            columns = choose_columns(found, reading, where=f"{path}, line {number + 1}")
            return JsonLines((path,), columns, reading, columns.facts(reading), columns.hints(found))
    # Nothing to choose from: what it holds, if anything, are broken lines, which are counted.
    columns = Columns(reading.ids_column or "input_ids", reading.mask_column, reading.attention_column)
    return JsonLines((path,), columns, reading, columns.facts(reading), ())


def _lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """(number, line, bytes of the file read so far)."""
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    try:
        with path.open("rb") as raw:
            file = InputFile(path, path.name, "jsonl", compression, 0)
            for number, line in enumerate(lines_of(file, raw)):
                yield number, line, raw.tell()
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"input file {path} cannot be read to its end: {error}") from error


def _object(line: bytes) -> dict[str, Any] | BadRecord:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        return BadRecord(f"not valid JSON ({error})")
    return value if isinstance(value, dict) else BadRecord(f"expected a JSON object, found {type(value).__name__}")


def _numbers(found: Mapping[str, Any], name: str, key: str) -> Ids | BadRecord:
    """The list of integers (or booleans, of a mask) of a key."""
    value = found.get(name)
    if not isinstance(value, list):
        return BadRecord(f"is {type(value).__name__ if name in found else 'missing'}, expected a list")
    allowed = {int, bool} if key == "flags" else {int}
    if alien := set(map(type, value)) - allowed:
        return BadRecord(f"holds {', '.join(sorted(kind.__name__ for kind in alien))}, expected integers only")
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError:
        return BadRecord("holds a number of more than 63 bits")
