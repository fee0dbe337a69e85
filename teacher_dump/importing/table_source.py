"""Targets in Parquet or Arrow files: one record for each sequence, its entries decoded by a layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from potstill.common.errors import UserError
from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.importing.foreign_records import (
    NO_BOUNDS,
    Entries,
    ForeignRecord,
    FoundRecord,
    SourceFacts,
    ValueKind,
)
from potstill.teacher_dump.importing.table_files import num_records, numbers, read_table, schema_of
from potstill.teacher_dump.inputs import InputFile, digest_files
from potstill.teacher_dump.records.base import BadRecord


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which columns a record has, and how its entries are made of them. `decode` raises BadRecord."""

    tokens: str
    entries: tuple[str, ...]
    decode: Callable[[Mapping[str, Any]], Entries]
    values: ValueKind
    segments: str | None = None
    has_normaliser: bool = False

    @property
    def columns(self) -> list[str]:
        return [self.tokens, *([self.segments] if self.segments else []), *self.entries]


class TableSource:
    """The records of several files, all of one layout."""

    def __init__(
        self,
        files: Sequence[InputFile],
        layout: Layout,
        *,
        format: str,
        k: int,
        settings: Mapping[str, Any],
        lost: Sequence[str],
    ) -> None:
        """Raises UserError where a file lacks a column."""
        self._files, self._layout = files, layout
        for file in files:
            names = schema_of(file).names
            missing = [name for name in layout.columns if name not in names]
            if missing:
                raise UserError(f"{file.path}: no column {', '.join(missing)}; found {', '.join(names)}")
        self.facts = SourceFacts(
            format=format,
            num_files=len(files),
            num_bytes=sum(file.num_bytes for file in files),
            digest=digest_files(files),
            values=layout.values,
            has_normaliser=layout.has_normaliser,
            selection={"mode": "top_k", "k": k},
            num_records=sum(num_records(file) for file in files),
            has_tokens=True,
            settings=settings,
            lost=(*lost, *(() if layout.segments else (NO_BOUNDS,))),
        )

    def read(self, start: Place, *, entries: bool) -> Iterator[FoundRecord]:
        """See TargetsSource."""
        layout = self._layout
        columns = layout.columns if entries else [name for name in layout.columns if name not in layout.entries]
        for number in range(start.file, len(self._files)):
            file = self._files[number]
            first = start.record if number == start.file else 0
            for found in read_table(file, columns, start=first):
                try:
                    record: ForeignRecord | BadRecord = self._record(found.values, entries=entries)
                except BadRecord as reason:
                    record = reason
                place = Place(number, found.number)
                where = f"{file.path}, record {found.number + 1}"
                yield FoundRecord(place, replace(place, record=place.record + 1), where, record)

    def _record(self, values: Mapping[str, Any], *, entries: bool) -> ForeignRecord:
        layout = self._layout
        tokens = whole_numbers(numbers(values[layout.tokens], layout.tokens), layout.tokens)
        segments = None
        if layout.segments is not None:
            segments = whole_numbers(numbers(values[layout.segments], layout.segments), layout.segments)
            if len(segments) != len(tokens):
                raise BadRecord(f"{layout.segments} has {len(segments)} items, {layout.tokens} has {len(tokens)}")
        return ForeignRecord(tokens, segments, _decoded(layout, values) if entries else None)


def _decoded(layout: Layout, values: Mapping[str, Any]) -> Entries | BadRecord:
    """The entries, or what is wrong with them: then the tokens are a row all the same."""
    try:
        return layout.decode(values)
    except BadRecord as reason:
        return reason


def whole_numbers(values: np.ndarray, name: str) -> np.ndarray:
    """The same numbers as int64. Raises BadRecord where one is not whole or does not fit."""
    if np.issubdtype(values.dtype, np.floating):
        whole = np.rint(np.where(np.isfinite(values), values, 0.5))
        if (whole != values).any():
            wrong = values[whole != values][0]
            raise BadRecord(f"{name} holds {wrong}, expected whole numbers; they may have been rounded on the way")
        if len(whole) and abs(whole).max() >= 1 << 53:
            raise BadRecord(f"{name} holds {abs(whole).max()}, no id")
        return whole.astype(np.int64)
    if values.dtype == np.uint64 and len(values) and int(values.max()) >= 1 << 63:
        raise BadRecord(f"{name} holds {values.max()}, no id")
    return values.astype(np.int64)
