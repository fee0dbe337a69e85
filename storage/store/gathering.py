"""What a seal makes of the records: they are read once, in order of units, and nothing of their rows is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from potstill.storage.errors import CorruptError, UnsealedError
from potstill.storage.files.commit import CommitRecord, list_records, read_record
from potstill.storage.files.durable import discard
from potstill.storage.files.folder import StoreFolder
from potstill.storage.files.paths import writing
from potstill.storage.store.index_file import EncodedIndex, IndexWriter, block_columns
from potstill.storage.store.notes import note_failure, noted_units
from potstill.storage.store.record_block import RecordBlock, read_blocks
from potstill.storage.store.spec import RunSpec
from potstill.storage.store.unit_bytes import UnitEntry, damaged_text

STAGES = {"tokens": "prepare", "targets": "dump", "scores": "score"}  # the command that writes each kind
MOST_LATE = 1000  # units that are asked for by name: a listing may be old, but does not lack more than that


@dataclass(kw_only=True)
class Gathered:
    """The units in order, sums over them, and their index in a local file."""

    path: Path
    index: EncodedIndex | None = None
    units: list[UnitEntry] = field(default_factory=list)
    num_rows: int = 0
    num_tokens: int = 0
    num_entries: int = 0
    num_targets: int = 0

    @property
    def num_bytes(self) -> int:
        return sum(unit.num_bytes for unit in self.units)

    def add(self, block: RecordBlock) -> None:
        """Some more units."""
        self.units += map(UnitEntry, block.files, block.num_bytes.tolist(), block.digests)
        self.num_rows += int(block.num_rows.sum())
        self.num_tokens += int(block.num_tokens.sum())
        self.num_entries += int(block.num_entries.sum())
        self.num_targets += int(block.num_targets.sum())


@contextmanager
def gathered(folder: StoreFolder, spec: RunSpec) -> Iterator[Gathered]:
    """Read all records and write the index of their rows to a scratch file, which is there inside `with`.

    Raises UnsealedError unless there is a readable record of every unit. Of those that are there and cannot be read, a
    note is left in failures/: the next worker looks into the records of noted units, and makes these again.
    """
    listed = list_records(folder, spec)
    num_units = _open_end(listed, spec, folder) if spec.num_rows is None else -(-spec.num_rows // spec.rows_per_unit)
    unlisted = [unit for unit in range(num_units) if unit not in listed]
    if len(unlisted) > MOST_LATE:
        raise UnsealedError(_missing_text(folder, spec, unlisted, num_units))
    found = Gathered(path=folder.scratch())
    try:
        wanted = {unit: listed.get(unit, 1) for unit in range(num_units)}
        with writing(str(found.path)):
            missing = _gather(folder, spec, wanted, found)
        if missing:
            _note(folder, [unit for unit in missing if unit in listed])
            raise UnsealedError(_missing_text(folder, spec, missing, num_units))
        yield found
    finally:
        discard(found.path)


def _gather(folder: StoreFolder, spec: RunSpec, wanted: dict[int, int], found: Gathered) -> list[int]:
    """Fill `found`; the units without a readable record. Raises CorruptError where one has not the rows it must."""
    missing: list[int] = []
    problems: list[str] = []
    writer = IndexWriter(found.path, spec.stats, spec.fingerprint)
    try:
        for block in read_blocks(folder, spec, wanted):
            missing += block.unreadable
            if not missing:
                problems += _wrong_sizes(block, spec, len(wanted))
                found.add(block)
                writer.add(block_columns(block, spec.stats))
        if problems and not missing:
            raise CorruptError(damaged_text(folder, problems, len(wanted)))
        if not missing:
            found.index = writer.finish()
    finally:
        writer.close()
    return missing


def _wrong_sizes(block: RecordBlock, spec: RunSpec, num_units: int) -> list[str]:
    """A line for each unit that does not hold the rows it must; the last one of a store of open length may be short."""
    full = np.full(len(block.units), spec.rows_per_unit)
    if spec.num_rows is not None:
        full = np.minimum(full, spec.num_rows - block.units * spec.rows_per_unit)
    else:
        full = np.where(block.units == num_units - 1, block.num_rows, full)
    wrong = np.flatnonzero(block.num_rows != full)
    return [f"unit {block.units[i]} holds {block.num_rows[i]} rows, expected {full[i]}" for i in wrong]


def _note(folder: StoreFolder, units: list[int]) -> None:
    noted = noted_units(folder)
    for unit in units:
        if unit not in noted:
            note_failure(folder, unit, "the record of this unit cannot be read (seal); the unit is to be made again")


def _missing_text(folder: StoreFolder, spec: RunSpec, missing: list[int], num_units: int) -> str:
    return (
        f"{folder.url}: {len(missing)} of {num_units} units are missing (first: {missing[:5]}); "
        f"run the same {_stage(spec)} again to complete them"
    )


def _stage(spec: RunSpec) -> str:
    """The command that writes such a store."""
    return "rollout" if "rollout" in spec.info else STAGES[spec.kind]


def _open_end(listed: dict[int, int], spec: RunSpec, folder: StoreFolder) -> int:
    """Number of units of a store whose length is known at the seal only.

    A writer that marks its last unit (`extra.end`) is held to it: without that mark a prepare that was killed in the
    middle would be sealed as a shorter corpus, and nobody would see it.
    """
    # Units that repair has taken out are known to exist, whether they are marked as the end or not.
    last_readable = next((unit for unit in reversed(listed) if _read(folder, spec, unit, listed) is not None), -1)
    num_units = max([last_readable, *noted_units(folder)]) + 1
    while read_record(folder, num_units, spec) is not None:  # by name: the listing may be older than the record
        num_units += 1
    if not num_units:
        raise UnsealedError(f"{folder.url}: no unit is committed, so there is nothing to seal; run prepare again")
    last = _read(folder, spec, num_units - 1, listed)
    if last is not None and last.extra.get("end") is False:
        raise UnsealedError(
            f"{folder.url}: {num_units} units are committed, but the last one is not marked as the end of the input; "
            "run the same prepare again to complete the store"
        )
    return num_units


def _read(folder: StoreFolder, spec: RunSpec, unit: int, listed: dict[int, int]) -> CommitRecord | None:
    return read_record(folder, unit, spec, generations=max(1, listed.get(unit, 0)))
