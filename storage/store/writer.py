"""StoreWriter: create or resume a run, and commit units of rows exactly once."""

from __future__ import annotations

import dataclasses
import logging
import re
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from potstill.storage.errors import (
    NO_ANSWER,
    CorruptError,
    MismatchError,
    NotAStoreError,
    StoreError,
    StoreExistsError,
    VersionError,
)
from potstill.storage.files.checked_json import dump_checked, is_torn, read_checked
from potstill.storage.files.commit import (
    MAX_GENERATIONS,
    MAX_RECORD_BYTES,
    CommitRecord,
    committed_records,
    has_records,
    list_records,
    max_record_bytes,
    parse_record,
    read_record,
    record_name,
)
from potstill.storage.files.durable import CLAIM
from potstill.storage.files.folder import SUBFOLDERS, StoreFolder, StorePath
from potstill.storage.files.paths import open_folder
from potstill.storage.files.unit_file import encode_unit
from potstill.storage.rows.id_map import ID_MAP_NAME, IdMap
from potstill.storage.rows.row_checks import check_rows, row_stats
from potstill.storage.rows.row_types import Row
from potstill.storage.store.notes import note_failure, note_refused, refused_by_notes
from potstill.storage.store.presence import committed_units, few_records, read_units
from potstill.storage.store.spec import RunSpec, require_same
from potstill.storage.store.stored_rows import as_stored, rows_of_record

logger = logging.getLogger(__name__)

RUN_NAME = "run.json"
MAX_RUN_BYTES = 16 << 20
_OWN_TOP_NAMES = re.compile(r"run\.json|manifest\.json(\.sig)?|index(-[0-9a-f]{12})?\.arrow|id_map\.u32")
# The dataset card (card.py). It goes with the store that it speaks of; a README.md of somebody else's stays.
CARD_NAME, CARD_MARK, MAX_CARD_BYTES = "README.md", b"A sealed store of potstill, of kind", 1 << 20


def load_spec(folder: StoreFolder) -> RunSpec:
    """Read run.json; NotAStoreError, which says what is there instead, when there is none."""
    value = read_checked(folder, RUN_NAME, max_bytes=MAX_RUN_BYTES)
    if value is None:
        raise NotAStoreError(folder.explain_absence())
    return RunSpec.from_json(value, where=f"{folder.url}/{RUN_NAME}")


def read_spec(path: StorePath) -> RunSpec:
    """What run.json of the store at `path` says; NotAStoreError when there is none, CorruptError when it is damaged."""
    return load_spec(open_folder(path))


def load_id_map(folder: StoreFolder, spec: RunSpec) -> IdMap | None:
    """The id table that run.json names, checked, or None when the store uses plain ids."""
    if spec.id_map_sha256 is None:
        return None
    where = f"{folder.url}/{ID_MAP_NAME}"
    data = folder.read(ID_MAP_NAME, max_bytes=4 * spec.vocab_size)
    if data is None:
        raise CorruptError(f"{where}: missing, but run.json needs it; restore it from a copy")
    return IdMap.from_bytes(data, vocab_size=spec.vocab_size, sha256=spec.id_map_sha256, where=where)


def has_run(folder: StoreFolder) -> bool:
    """Whether a run.json stands there; one that was never finished does not count while no unit has a record."""
    data = folder.read(RUN_NAME, max_bytes=MAX_RUN_BYTES)
    return data is not None and not (is_torn(data) and not has_records(folder))


class StoreWriter:
    """Writes the units of one store; any number of writers may work on the same store at once."""

    def __init__(self, folder: StoreFolder, spec: RunSpec, id_map: IdMap | None) -> None:
        self._folder, self._spec, self._id_map = folder, spec, id_map
        self._committed: set[int] = set()  # by this writer: a listing may not show them yet

    @classmethod
    def create(
        cls,
        path: StorePath,
        spec: RunSpec,
        *,
        force: bool = False,
        id_frequencies: ArrayLike | None = None,
    ) -> StoreWriter:
        """Create the store, or open the same run to resume it.

        Raises MismatchError (naming the field) when another run lies there, StoreExistsError when the folder holds
        something else, WriteFailedError when it cannot be written. Folders above it are made. `force` deletes a
        store that stands there first, but none of another kind: that is a mistake in the path.
        `id_frequencies` [V] turns on frequency-ranked ids.
        """
        folder = open_folder(path)
        folder.check_writable()
        id_map = None if id_frequencies is None else IdMap.from_frequencies(id_frequencies)
        if id_map is not None:
            if len(id_map.id_of_rank) != spec.vocab_size:
                raise StoreError(f"id frequencies: {len(id_map.id_of_rank)} values for {spec.vocab_size} ids")
            spec = dataclasses.replace(spec, id_map_sha256=id_map.sha256)
        if force:
            _refuse_other_kind(folder, spec)
            delete_store(folder)
        run = dump_checked(spec.to_json())
        if folder.parallel_reads > 1 and folder.read(RUN_NAME, max_bytes=MAX_RUN_BYTES) == run:
            # Whoever has begun it has proved the place: of many workers each would ask for the same again.
            logger.info("resuming the store %s", folder.url)
            return cls(folder, spec, load_id_map(folder, spec))
        _refuse_foreign(folder)
        _refuse_other_units(folder, spec)
        folder.prepare()
        if id_map is not None and folder.read(ID_MAP_NAME, max_bytes=4 * spec.vocab_size) is None:
            folder.create(ID_MAP_NAME, id_map.to_bytes())
        if not folder.create(RUN_NAME, run) and (has_run(folder) or not folder.replace_torn(RUN_NAME, run)):
            require_same(load_spec(folder), spec, where=f"{folder.url}/{RUN_NAME}")
            logger.info("resuming the store %s", folder.url)
        return cls(folder, spec, load_id_map(folder, spec))

    @classmethod
    def resume(cls, path: StorePath, spec: RunSpec) -> StoreWriter | None:
        """Open the same run if it has committed a unit, else None; nothing is written.

        Without a committed unit nothing is lost when the store is created anew with `force`: a run.json alone does not
        hold the place for other options. Raises MismatchError when another run has units here, StoreExistsError when
        the folder holds something else, WriteFailedError when it is plain that it cannot be written.
        """
        folder = open_folder(path)
        folder.check_writable()
        _refuse_foreign(folder)
        if not has_run(folder):
            return None
        found = load_spec(folder)
        if found.kind == spec.kind and not has_records(folder):
            return None
        require_same(found, spec, where=f"{folder.url}/{RUN_NAME}")
        logger.info("resuming the store %s", folder.url)
        return cls(folder, spec, load_id_map(folder, spec))

    @property
    def spec(self) -> RunSpec:
        return self._spec

    @property
    def url(self) -> str:
        """Where the store is, for messages."""
        return self._folder.url

    @property
    def num_units(self) -> int | None:
        """Units of the whole store; None while the number of rows is unknown."""
        rows = self._spec.num_rows
        return None if rows is None else -(-rows // self._spec.rows_per_unit)

    def unit_rows(self, unit: int) -> range:
        """Row numbers of a unit; they depend on the input only."""
        spec = self._spec
        if unit < 0 or (self.num_units is not None and unit >= self.num_units):
            raise StoreError(f"unit {unit} does not exist, the store has {self.num_units} units")
        first = unit * spec.rows_per_unit
        last = first + spec.rows_per_unit
        return range(first, last if spec.num_rows is None else min(last, spec.num_rows))

    def todo(self, *, worker: int = 0, num_workers: int = 1, sealed: bool = False) -> list[int]:
        """Units of this worker's share (unit % num_workers) that have no readable record, in order.

        Of many units a record that a listing names is taken for readable, see presence.py; where `check_sealed` has
        just looked at it (`sealed`), none of these is looked at again.
        """
        if not 0 <= worker < num_workers:
            raise StoreError(f"worker {worker} is not in [0, {num_workers})")
        if self.num_units is None:
            raise StoreError("the number of rows is unknown before the seal; count units yourself")
        share = range(worker, self.num_units, num_workers)
        if sealed and len(share) > few_records(self._folder):
            return []
        found = committed_units(self._folder, self._spec, share, own=self._committed)
        return [unit for unit in share if unit not in found]

    def committed(self) -> dict[int, CommitRecord]:
        """Readable records by unit."""
        return committed_records(self._folder, self._spec)

    def record(self, unit: int) -> CommitRecord | None:
        """The readable record of one unit, or None."""
        return read_record(self._folder, unit, self._spec)

    def committed_rows(self, unit: int) -> list[Row]:
        """Every row of a committed unit, in order; none where the unit has no readable record."""
        record = self.record(unit)
        return [] if record is None else rows_of_record(self._folder, record, spec=self._spec, id_map=self._id_map)

    def as_stored(self, rows: Sequence[Row]) -> list[Row]:
        """What a reader would find of these rows if they were committed; nothing is written."""
        return as_stored(rows, spec=self._spec, id_map=self._id_map)

    def commit_unit(self, unit: int, rows: Sequence[Row], *, extra: Mapping[str, Any] | None = None) -> bool:
        """Encode, write durably and commit; False if another attempt at this unit had won.

        Raises StoreError (naming row and rule) for bad rows and WriteFailedError when nothing was committed.
        """
        wanted = self.unit_rows(unit)
        check_rows(rows, spec=self._spec, wanted=wanted)
        if read_record(self._folder, unit, self._spec) is not None:
            return False
        encoded = encode_unit(rows, spec=self._spec, unit=unit, id_map=self._id_map)
        record = CommitRecord(
            unit=unit,
            file=f"u{unit:07d}-{secrets.token_hex(6)}.arrow",
            num_bytes=len(encoded.data),
            sha256=encoded.sha256,
            first_row=wanted.start,
            batch_table=np.array([[b.offset, b.length, b.crc32, b.num_rows] for b in encoded.batches], np.int64),
            num_tokens=np.array(encoded.num_tokens, np.int64),
            num_entries=np.array(encoded.num_entries, np.int64),
            num_targets=encoded.num_targets,
            stats={name: np.array(values) for name, values in row_stats(rows, spec=self._spec).items()},
            time_seconds=round(time.time(), 3),
            extra=dict(extra or {}),
        )
        self._folder.put(f"units/{record.file}", encoded.data)
        won = self._publish_record(unit, record.file, record.to_bytes(self._spec.fingerprint))
        self._committed.add(unit)
        if not won:
            self._folder.delete(f"units/{record.file}")
        return won

    def _publish_record(self, unit: int, file: str, data: bytes) -> bool:
        """Create the record under the first generation whose name is free; readable earlier ones win."""
        for generation in range(MAX_GENERATIONS):
            name = f"units/{record_name(unit, generation)}"
            if self._folder.create(name, data):
                return True
            try:
                found = read_checked(self._folder, name, max_bytes=max_record_bytes(self._spec))
                winner = parse_record(found or {}, unit=unit, spec=self._spec, where=f"{self._folder.url}/{name}")
            except CorruptError as error:
                logger.warning("stepping over an unreadable record: %s", error)
                continue
            # A repeated request whose first answer was lost finds our own record.
            return winner.file == file
        raise StoreError(f"unit {unit}: {MAX_GENERATIONS} unreadable records; the folder {self._folder.url} is broken")

    def record_failure(self, unit: int, reason: str) -> None:
        """Note why an attempt failed, in failures/; the unit stays to be done."""
        note_failure(self._folder, unit, reason)

    def note_refused(self, unit: int, num_rows: int) -> None:
        """Note, before a unit is committed, that so many of its rows are refused: for `num_refused`."""
        note_refused(self._folder, unit, num_rows)

    def num_refused(self, *, allowed: int, except_units: Collection[int] = ()) -> int:
        """Rows that the records of committed units call refused (`extra.refused`), at least as many as there are.

        Of a store of many units, by the notes in refused/: too many where an attempt was killed between its note and
        its record. As soon as these say more than half of what is `allowed`, the records of their units are read.
        """
        if self.num_units is not None and self.num_units <= few_records(self._folder):
            records = self.committed()
        else:
            noted = {u: n for u, n in refused_by_notes(self._folder).items() if u not in except_units}
            if 2 * sum(noted.values()) <= allowed:
                return sum(noted.values())
            records = read_units(self._folder, self._spec, dict.fromkeys(noted, None))
        return sum(len(r.extra.get("refused", ())) for unit, r in records.items() if unit not in except_units)


def check_output(path: StorePath) -> None:
    """Raise StoreExistsError or WriteFailedError when it is plain that no store can be written at `path`.

    For an early word before anything is loaded: nothing is created, and a store that stands there is no error.
    """
    folder = open_folder(path)
    folder.check_writable()
    _refuse_foreign(folder)


def discard_unused(path: StorePath) -> None:
    """Take away a store in which no unit is committed, with its empty folder; anything else is left as it is."""
    folder = open_folder(path)
    if not has_records(folder):
        delete_store(folder)
        folder.remove_if_empty()


def discard_store(path: StorePath, *, kind: str, writer: str) -> None:
    """Delete the store that stands at `path`, if any, with its empty folder.

    Raises MismatchError, and deletes nothing, unless it is of this kind and its run.json says in `info` that this
    `writer` made it: anything else is a mistake in the path.
    """
    folder = open_folder(path)
    if not has_run(folder):
        return
    found = load_spec(folder)
    if found.kind != kind or writer not in found.info:
        raise MismatchError(
            f"{folder.url} is a store of {found.kind} that {writer} did not write; name another output, or delete it "
            "yourself"
        )
    delete_store(folder)
    folder.remove_if_empty()


def delete_store(folder: StoreFolder) -> None:
    """Delete the files of a store, run.json last; without a run.json only what a killed writer has claimed."""
    for item in folder.names("tmp"):
        if item.startswith(CLAIM):  # it would be published by the next one
            folder.delete(f"tmp/{item}")
    if folder.read(RUN_NAME, max_bytes=MAX_RUN_BYTES) is None:
        return
    logger.warning("deleting the store %s", folder.url)
    top = [name for name in folder.names("") if _OWN_TOP_NAMES.fullmatch(name)]
    if CARD_MARK in (folder.read(CARD_NAME, max_bytes=MAX_CARD_BYTES) or b""):
        top.append(CARD_NAME)
    # The manifest goes first: without it no reader takes the rest for a sealed store.
    for name in sorted(top, key=lambda n: (n == RUN_NAME, n != "manifest.json")):
        if name == RUN_NAME:
            for sub in SUBFOLDERS:
                for item in folder.names(sub):
                    folder.delete(f"{sub}/{item}")
        folder.delete(name)


def _refuse_other_kind(folder: StoreFolder, spec: RunSpec) -> None:
    try:
        found = load_spec(folder)
    except (NotAStoreError, CorruptError, VersionError):
        return  # nothing there, or nothing that anybody can read
    if found.kind != spec.kind:
        require_same(found, spec, where=f"{folder.url}/{RUN_NAME}")


def fingerprint_of_records(folder: StoreFolder) -> str | None:
    """The run that the first readable record in `folder` names, None where there is no such record."""
    for unit, generations in list_records(folder).items():
        for generation in range(generations):
            try:
                value = read_checked(folder, f"units/{record_name(unit, generation)}", max_bytes=MAX_RECORD_BYTES)
            except NO_ANSWER:
                raise
            except StoreError as error:
                logger.warning("unit %d tells no run: %s", unit, error)
                continue
            if value is not None and isinstance(value.get("fingerprint"), str):
                return str(value["fingerprint"])
    return None


def _refuse_other_units(folder: StoreFolder, spec: RunSpec) -> None:
    """Where repair has taken a damaged run.json out, only the same run may write it anew: the units are its own."""
    if folder.read(RUN_NAME, max_bytes=MAX_RUN_BYTES) is not None:
        return
    found = fingerprint_of_records(folder)
    if found is not None and found != spec.fingerprint:
        raise MismatchError(
            f"{folder.url}: there is no run.json, and the units are of the run {found}, this is {spec.fingerprint}; "
            "use the options that the store was written with, another output, or delete the folder"
        )


def _refuse_foreign(folder: StoreFolder) -> None:
    try:
        foreign = [name for name in folder.names("") if not _OWN_TOP_NAMES.fullmatch(name)]
    except NotAStoreError as error:
        raise StoreExistsError(str(error)) from None
    if foreign:
        raise StoreExistsError(
            f"{folder.url} holds other files ({', '.join(foreign[:3])}); name an empty or new folder for the store"
        )
