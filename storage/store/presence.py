"""Which units are committed: by the contents of their records where these are few, by their names where they are many.

A name that is listed stands for a record in a store of many units, as reading all of them takes minutes. So that a
record which cannot be read is still found, those that look wrong are read all the same: empty ones, those that had to
step over another, and those of units that a note in failures/ names. A seal reads every record, and leaves such a note.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from potstill.storage.files.collecting import without_collection
from potstill.storage.files.commit import (
    MAX_GENERATIONS,
    CommitRecord,
    generations_of,
    read_record,
    record_unit,
    unit_cuts,
)
from potstill.storage.files.folder import Listed, StoreFolder
from potstill.storage.files.prefetch import in_parallel
from potstill.storage.store.notes import noted_units
from potstill.storage.store.spec import RunSpec

# Records that are read whatever their names say: so many cost a second of this machine, or a few rounds of requests.
FEW_LOCAL, FEW_REMOTE = 1000, 128
_PAGE_OBJECTS = 1000  # of a listing: a unit has two
_LEAST_BYTES = 200  # of a record: its digests alone take 128


def few_records(folder: StoreFolder) -> int:
    """How many records are read whatever their names say."""
    return FEW_REMOTE if folder.parallel_reads > 1 else FEW_LOCAL


@dataclass(frozen=True)
class Records:
    """What a listing tells of the records in units/: how many of each unit, and those that look wrong."""

    generations: dict[int, int]
    suspects: frozenset[int]


def committed_units(folder: StoreFolder, spec: RunSpec, units: Sequence[int], *, own: Collection[int] = ()) -> set[int]:
    """Those of `units` that have a record. `own` were committed by this process: a listing may not show them yet.

    Where `few_records` are enough, all of them are read, over a network without a listing if that costs more.
    """
    remote = folder.parallel_reads > 1
    few = few_records(folder)
    if remote and spec.num_rows is not None and len(units) <= min(few, _num_pages(spec)):
        return set(read_units(folder, spec, dict.fromkeys(units, None)))
    found = look_at_records(folder.listing("units", cuts=unit_cuts(spec), suffix=".json"))
    listed = {unit: found.generations.get(unit, int(unit in own)) for unit in units}
    listed = {unit: generations for unit, generations in listed.items() if generations}
    if len(units) <= few:
        return set(read_units(folder, spec, listed))
    wrong = found.suspects | noted_units(folder)
    doubtful = {unit: generations for unit, generations in listed.items() if unit in wrong}
    return (listed.keys() - doubtful.keys()) | read_units(folder, spec, doubtful).keys()


@without_collection()
def look_at_records(listing: dict[str, Listed]) -> Records:
    """Sort what is listed in units/."""
    generations = generations_of(listing)
    wrong = {unit for unit, number in generations.items() if number > 1}
    for name, listed in listing.items():
        unit = record_unit(name) if listed.num_bytes < _LEAST_BYTES else None
        if unit is not None:
            wrong.add(unit)
    return Records(generations, frozenset(wrong))


def read_units(folder: StoreFolder, spec: RunSpec, generations: Mapping[int, int | None]) -> dict[int, CommitRecord]:
    """Readable records of these units, several at once over a network; None: as many generations as there are."""

    def read(unit: int, number: int | None) -> CommitRecord | None:
        if number is None:
            return read_record(folder, unit, spec, generations=MAX_GENERATIONS, to_the_end=True)
        return read_record(folder, unit, spec, generations=number)

    works = [partial(read, unit, number) for unit, number in generations.items()]
    if folder.parallel_reads == 1:
        found = [work() for work in works]
    else:
        found = in_parallel(works, num_threads=min(folder.parallel_reads, max(1, len(works))))
    return {record.unit: record for record in found if record is not None}


def _num_pages(spec: RunSpec) -> int:
    assert spec.num_rows is not None
    return 2 * -(-spec.num_rows // spec.rows_per_unit) // _PAGE_OBJECTS
