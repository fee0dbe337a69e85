"""store_status: how far a store is, from its files alone (nothing that runs is asked)."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from potstill.storage.files.commit import CommitRecord, record_unit, unit_cuts
from potstill.storage.files.folder import Listed, StoreFolder, StorePath
from potstill.storage.files.paths import open_folder
from potstill.storage.store.notes import noted_units
from potstill.storage.store.presence import look_at_records, read_units
from potstill.storage.store.seal import load_manifest
from potstill.storage.store.spec import RunSpec
from potstill.storage.store.writer import load_spec

_RECENT_SECONDS = 900.0  # of work, for the rate: long enough to be steady, short enough to follow a change of workers
_FEW = 2000  # records that are all read; of more some are, evenly spread, and the newest
_SAMPLE = 128
_CLOCKS_AGREE_SECONDS = 60.0
_ATTEMPT = re.compile(r"u(\d{7,12})-[0-9a-f]{12}\.arrow")


@dataclass(frozen=True, kw_only=True)
class StoreStatus:
    """Counts of units and rows. `failed` units have a failure note and no record; `missing` includes them.

    Times come from the records and are for people only. worker_seconds adds up what workers noted as `extra.seconds` of
    the units they committed; active_seconds is the time when any of them was at work, so without pauses. The rate is
    that of all workers in the last stretch of it. None where the records do not tell.

    `estimated`: not every record was read, as there are many. Counts of units are of names then, rows those of whole
    units, bytes of the files' sizes, and times of when the records were written and of some records' seconds.
    """

    kind: str
    num_units: int | None
    committed: int
    failed: int
    missing: int | None
    rows_committed: int
    sealed: bool
    rate_rows_per_second: float | None
    eta_seconds: float | None
    worker_seconds: float | None
    active_seconds: float | None
    bytes: int
    estimated: bool


class _Work(NamedTuple):
    """What the committed units say together."""

    units: Collection[int]
    rows: int
    bytes: int
    rate: float | None
    worker_seconds: float | None
    active_seconds: float | None


def store_status(path: StorePath) -> StoreStatus:
    """Status of a sealed or unsealed store; NotAStoreError when there is none."""
    folder = open_folder(path)
    spec = load_spec(folder)
    manifest = load_manifest(folder, spec)
    num_units = None if spec.num_rows is None else -(-spec.num_rows // spec.rows_per_unit)
    if manifest is not None:
        num_units = len(manifest.units)
    listing = folder.listing("units", cuts=unit_cuts(spec))
    generations = look_at_records(listing).generations
    noted = noted_units(folder)
    estimated = len(generations) > _FEW
    work = _estimated(folder, spec, listing, noted) if estimated else _exact(read_units(folder, spec, generations))
    left = None if spec.num_rows is None else spec.num_rows - work.rows
    return StoreStatus(
        kind=spec.kind,
        num_units=num_units,
        committed=len(work.units),
        failed=len(noted - set(work.units)),
        missing=None if num_units is None else num_units - len(work.units),
        rows_committed=work.rows,
        sealed=manifest is not None,
        rate_rows_per_second=work.rate,
        eta_seconds=left / work.rate if work.rate and left is not None else None,
        worker_seconds=work.worker_seconds,
        active_seconds=work.active_seconds,
        bytes=work.bytes,
        estimated=estimated,
    )


def _exact(records: dict[int, CommitRecord]) -> _Work:
    timeline = _Timeline(
        ended=[r.time_seconds for r in records.values()],
        seconds=_seconds_noted(records.values()),
        rows=[len(r.num_tokens) for r in records.values()],
    )
    return _Work(
        units=records.keys(),
        rows=sum(timeline.rows),
        bytes=sum(r.num_bytes for r in records.values()),
        rate=timeline.recent_rate(),
        worker_seconds=None if timeline.seconds is None else sum(timeline.seconds),
        active_seconds=timeline.active_seconds(),
    )


def _estimated(folder: StoreFolder, spec: RunSpec, listing: dict[str, Listed], noted: set[int]) -> _Work:
    """From names, sizes and times of the files, and of records those that look wrong and `_SAMPLE` others, twice."""
    found = look_at_records(listing)
    ended = np.zeros(len(found.generations))
    place = {unit: number for number, unit in enumerate(found.generations)}
    for name, listed in listing.items():
        unit = record_unit(name)
        if unit is not None:
            ended[place[unit]] = max(ended[place[unit]], listed.modified_seconds)
    units = np.array(list(found.generations))
    doubtful = {unit: found.generations[unit] for unit in (found.suspects | noted) & found.generations.keys()}
    unreadable = doubtful.keys() - read_units(folder, spec, doubtful).keys()
    kept = ~np.isin(units, np.array(sorted(unreadable), np.int64))
    units, ended = units[kept], ended[kept]
    newest = np.argsort(ended, kind="stable")[-_SAMPLE:]
    even = np.arange(_SAMPLE) * len(units) // _SAMPLE
    places = np.unique(np.concatenate([even, newest, [len(units) - 1]]))
    sample = read_units(folder, spec, {int(unit): found.generations[int(unit)] for unit in units[places]})
    last = sample.get(int(units[-1]))
    short = 0 if last is None else spec.rows_per_unit - len(last.num_tokens)
    rows = [spec.rows_per_unit] * (len(units) - 1) + [spec.rows_per_unit - short]
    noted_seconds = _seconds_noted([sample[int(unit)] for unit in units[even] if int(unit) in sample])
    mean = None if noted_seconds is None else float(np.mean(noted_seconds))
    timeline = _Timeline(ended.tolist(), None if mean is None else [mean] * len(units), rows)
    # A store that was copied has files of the day of the copy: these tell nothing.
    off = [abs(ended[i] - sample[int(units[i])].time_seconds) for i in places if int(units[i]) in sample]
    told = bool(off) and float(np.median(off)) <= _CLOCKS_AGREE_SECONDS
    return _Work(
        units=units.tolist(),
        rows=sum(rows),
        bytes=_bytes_of(set(units.tolist()), listing),
        rate=timeline.recent_rate() if told else None,
        worker_seconds=None if mean is None else mean * len(units),
        active_seconds=timeline.active_seconds() if told else None,
    )


def _bytes_of(units: set[int], listing: dict[str, Listed]) -> int:
    """Bytes of one data file of each unit; of several attempts at one, the largest."""
    largest: dict[int, int] = {}
    for name, listed in listing.items():
        match = _ATTEMPT.fullmatch(name)
        if match and int(match.group(1)) in units:
            unit = int(match.group(1))
            largest[unit] = max(largest.get(unit, 0), listed.num_bytes)
    return sum(largest.values())


def _seconds_noted(records: Collection[CommitRecord]) -> list[float] | None:
    """`extra.seconds` of every record; None when there is no record, or one without it."""
    noted = [float(r.extra["seconds"]) for r in records if isinstance(r.extra.get("seconds"), int | float)]
    return noted if noted and len(noted) == len(records) else None


@dataclass(frozen=True)
class _Timeline:
    """When each unit was committed, the seconds that it took (None where one does not tell), and its rows."""

    ended: list[float]
    seconds: list[float] | None
    rows: list[int]

    def active_seconds(self) -> float | None:
        """How long any worker was at work."""
        spells = self._spells()
        return None if spells is None else sum(end - start for start, end in spells) or None

    def _spells(self) -> list[tuple[float, float]] | None:
        """When any worker was at work, as (start, end) in order without overlap; None when a record does not tell.

        A unit that took s seconds and was committed at t was worked at from t - s to t. Stores without such notes
        (those of prepare) have one spell from the first record to the last.
        """
        if self.seconds is None:
            return [(min(self.ended), max(self.ended))] if self.ended else None
        merged: list[tuple[float, float]] = []
        for start, end in sorted((end - s, end) for end, s in zip(self.ended, self.seconds, strict=True)):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        return merged or None

    def recent_rate(self) -> float | None:
        """Rows per second of the last stretch of work: `_RECENT_SECONDS`, or three of the longest units."""
        spells = self._spells()
        if spells is None:
            return None
        if self.seconds is None:
            # One spell, and the first unit only marks its start: its rows do not count.
            rows = sum(self.rows) * (len(self.rows) - 1) / len(self.rows)
            seconds = spells[0][1] - spells[0][0]
            return rows / seconds if seconds > 0 and rows else None
        wanted, active = max(_RECENT_SECONDS, 3 * max(self.seconds)), 0.0
        since = spells[0][0]
        for start, end in reversed(spells):
            if active + end - start >= wanted:
                since = end - (wanted - active)
                active = wanted
                break
            active += end - start
        rows = sum(rows for end, rows in zip(self.ended, self.rows, strict=True) if end > since)
        return rows / active if active > 0 else None
