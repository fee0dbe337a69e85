"""The stores that `prepare` writes: each begins with its first unit, so that a run that fails before leaves nothing."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from potstill.storage import MismatchError, RunSpec, StoreReader, StoreWriter, TokensRow, discard_unused, seal_store
from potstill.teacher_dump.documents import Document, Place
from potstill.teacher_dump.kept_tokenizer import KeptTokenizer
from potstill.teacher_dump.packing import Cursor, PackedRow, Packer


@dataclass(frozen=True)
class StoreSummary:
    """What one store holds."""

    path: Path | str
    documents: int
    rows: int
    tokens: int


class Output:
    """One tokens store being written: packs documents, commits whole units, continues where an earlier run ended.

    Nothing is written before the first unit is whole. The tokenizer is placed then, ahead of the store, and nothing of
    either is left if that unit cannot be committed. `force` deletes another store at that moment, not before.
    """

    def __init__(self, path: Path | str, spec: RunSpec, *, force: bool, tokenizer: KeptTokenizer | None) -> None:
        self.path, self.spec = path, spec
        self._force, self._tokenizer = force, tokenizer
        self._writer = None if force else StoreWriter.resume(path, spec)
        records = {} if self._writer is None else self._writer.committed()
        self._unit = next(unit for unit in itertools.count() if unit not in records)
        self.complete = False
        self.start: Cursor | None = None
        self.bad_lines: int | None = None
        first_row = 0
        if self._unit:
            extra = records[self._unit - 1].extra
            self.start = Cursor.from_json(extra["cursor"])
            self.complete = bool(extra["end"])
            self.bad_lines = extra["bad_lines"]
            first_row = int(extra["rows"])
        self.resumed_rows = first_row
        self.rows = first_row
        self._pending: list[PackedRow] = []
        self._packer = Packer(row_length=spec.row_length, first_row=first_row, start=self.start)

    @property
    def begun(self) -> bool:
        """Whether the store exists, with a unit of this run."""
        return self._writer is not None

    @property
    def empty(self) -> bool:
        """Whether no token has come so far."""
        return self._packer.tokens == 0

    def wants(self, place: Place) -> bool:
        return not self.complete and self._packer.wants(place)

    def add(self, document: Document, ids: np.ndarray) -> None:
        for packed in self._packer.add(document, ids):
            self._append(packed)

    def finish(self, end: Place, *, bad_lines: int) -> StoreSummary:
        """Commit what is left; the store must not be empty."""
        if not self.complete:
            for packed in self._packer.finish(end, bad_lines=bad_lines):
                self._append(packed)
            if self._pending:
                self._commit(bad_lines=bad_lines)
        return StoreSummary(self.path, self._packer.documents, self.rows, self._packer.tokens)

    def seal(self) -> None:
        """Seal the store. Raises MismatchError when another run has taken its place in the meantime."""
        seal_store(self.path)
        if StoreReader(self.path).spec.fingerprint != self.spec.fingerprint:
            raise MismatchError(
                f"{self.path}: another prepare with other options replaced this store while it was written; run one at "
                "a time, or give each an output of its own"
            )

    def _append(self, packed: PackedRow) -> None:
        # A unit is committed only when a next row shows that it was not the last one, which is marked in its record.
        if len(self._pending) == self.spec.rows_per_unit:
            self._commit()
        self._pending.append(packed)

    def _commit(self, *, bad_lines: int | None = None) -> None:
        """Commit the pending rows; `bad_lines` of the whole input is given with the last unit only."""
        if self._writer is None:
            self._begin(bad_lines)
        else:
            self._commit_to(self._writer, bad_lines)

    def _begin(self, bad_lines: int | None) -> None:
        """Place the tokenizer, create the store and commit its first unit: all or nothing."""
        try:
            if self._tokenizer is not None:
                self._tokenizer.place()
            writer = self._create()
            self._commit_to(writer, bad_lines)
        except BaseException:
            discard_unused(self.path)
            if self._tokenizer is not None:
                self._tokenizer.withdraw()
            raise
        self._writer = writer
        if self._tokenizer is not None:
            self._tokenizer.settle()

    def _create(self) -> StoreWriter:
        try:
            return StoreWriter.create(self.path, self.spec, force=self._force)
        except MismatchError:
            # A run.json of other options without a unit, from a run that was killed: nothing is lost with it.
            StoreWriter.resume(self.path, self.spec)  # raises where another run has units
            return StoreWriter.create(self.path, self.spec, force=True)

    def _commit_to(self, writer: StoreWriter, bad_lines: int | None) -> None:
        rows: list[TokensRow] = [packed.row for packed in self._pending]
        self.rows += len(rows)
        cursor = self._pending[-1].cursor
        extra = {"cursor": cursor.to_json(), "rows": self.rows, "end": bad_lines is not None, "bad_lines": bad_lines}
        writer.commit_unit(self._unit, rows, extra=extra)
        self._unit += 1
        self._pending = []
