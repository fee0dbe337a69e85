"""Units of a store that is filled record by record, in order: whole units are committed, with the place of the next."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from potstill.storage import MismatchError, Row, RunSpec, StoreReader, StoreWriter, discard_unused, seal_store
from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.importing.foreign_rows import Figures


class RecordUnits:
    """A store that continues where an earlier run ended: `place`, `rows`, `bad_records`, `figures` are as of there.

    Nothing is written before the first unit is whole, and nothing is left where that one cannot be committed. `force`
    deletes another store at that moment, not before.
    """

    def __init__(self, path: Path | str, spec: RunSpec, *, force: bool, bad_records: int = 0) -> None:
        self.path, self.spec = path, spec
        self._force = force
        self._writer = None if force else StoreWriter.resume(path, spec)
        records = {} if self._writer is None else self._writer.committed()
        self._unit = next(unit for unit in itertools.count() if unit not in records)
        self.place, self.rows, self.bad_records, self.figures = Place(0, 0), 0, bad_records, Figures()
        self.complete = False
        if self._unit:
            extra = records[self._unit - 1].extra
            self.place = Place(*extra["next_record"])
            self.rows, self.bad_records = int(extra["rows"]), int(extra["bad_records"])
            self.complete = bool(extra["end"])
            self.figures = Figures.from_json(extra["figures"])
        self.resumed_rows = self.rows

    @property
    def begun(self) -> bool:
        """Whether a unit of this run is there."""
        return self._unit > 0

    def commit(self, rows: Sequence[Row], *, next_place: Place, bad_records: int, end: bool) -> None:
        """Commit the next unit; `end`: it is the last one. `figures` is written as it stands."""
        self.rows, self.place, self.bad_records, self.complete = self.rows + len(rows), next_place, bad_records, end
        extra = {
            "next_record": [next_place.file, next_place.record],
            "rows": self.rows,
            "bad_records": bad_records,
            "end": end,
            "figures": self.figures.to_json(),
        }
        try:
            if self._writer is None:
                self._writer = self._create()
            self._writer.commit_unit(self._unit, rows, extra=extra)
        except BaseException:
            if not self._unit:
                discard_unused(self.path)
            raise
        self._unit += 1

    def _create(self) -> StoreWriter:
        try:
            return StoreWriter.create(self.path, self.spec, force=self._force)
        except MismatchError:
            # A run.json of other options without a unit, from a run that was killed: nothing is lost with it.
            StoreWriter.resume(self.path, self.spec)  # raises where another run has units
            return StoreWriter.create(self.path, self.spec, force=True)

    def seal(self) -> StoreReader:
        """Seal the store and open it. Raises MismatchError when another run has taken its place in the meantime."""
        seal_store(self.path)
        reader = StoreReader(self.path)
        if reader.spec.fingerprint != self.spec.fingerprint:
            raise MismatchError(
                f"{self.path}: another import with other options replaced this store while it was written; run one at "
                "a time, or give each an output of its own"
            )
        return reader
