"""store_status: how far a store is, from its files alone (nothing that runs is asked)."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from potstill.storage.files.commit import CommitRecord, committed_records
from potstill.storage.files.folder import StorePath
from potstill.storage.files.paths import open_folder
from potstill.storage.store.seal import load_manifest
from potstill.storage.store.writer import load_spec

_RECENT_SECONDS = 900.0  # of work, for the rate: long enough to be steady, short enough to follow a change of workers
_FAILURE = re.compile(r"u(\d{7,12})-[0-9a-f]{12}\.json")


@dataclass(frozen=True, kw_only=True)
class StoreStatus:
    """Counts of units and rows. `failed` units have a failure note and no record; `missing` includes them.

    Times come from the records and are for people only. worker_seconds adds up what workers noted as `extra.seconds` of
    the units they committed; active_seconds is the time when any of them was at work, so without pauses. The rate is
    that of all workers in the last stretch of it. None where the records do not tell.
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


def store_status(path: StorePath) -> StoreStatus:
    """Status of a sealed or unsealed store; NotAStoreError when there is none."""
    folder = open_folder(path)
    spec = load_spec(folder)
    manifest = load_manifest(folder, spec)
    records = committed_records(folder, spec)
    num_units = None if spec.num_rows is None else -(-spec.num_rows // spec.rows_per_unit)
    if manifest is not None:
        num_units = len(manifest.units)
    noted = {int(m.group(1)) for name in folder.names("failures") if (m := _FAILURE.fullmatch(name))}
    rows = sum(len(r.num_tokens) for r in records.values())
    spells = _spells(records.values())
    rate = _recent_rate(records.values(), spells)
    spent = _seconds_noted(records.values())
    active = None if spells is None else sum(end - start for start, end in spells)
    left = None if spec.num_rows is None else spec.num_rows - rows
    return StoreStatus(
        kind=spec.kind,
        num_units=num_units,
        committed=len(records),
        failed=len(noted - records.keys()),
        missing=None if num_units is None else num_units - len(records),
        rows_committed=rows,
        sealed=manifest is not None,
        rate_rows_per_second=rate,
        eta_seconds=left / rate if rate and left is not None else None,
        worker_seconds=None if spent is None else sum(spent),
        active_seconds=active or None,
        bytes=sum(r.num_bytes for r in records.values()),
    )


def _seconds_noted(records: Collection[CommitRecord]) -> list[float] | None:
    """`extra.seconds` of every record; None when there is no record, or one without it."""
    noted = [float(r.extra["seconds"]) for r in records if isinstance(r.extra.get("seconds"), int | float)]
    return noted if noted and len(noted) == len(records) else None


def _spells(records: Collection[CommitRecord]) -> list[tuple[float, float]] | None:
    """When any worker was at work, as (start, end) in order without overlap; None when a record does not tell.

    A unit that took s seconds and was committed at t was worked at from t - s to t. Stores without such notes (those of
    prepare) have one spell from the first record to the last.
    """
    times = [r.time_seconds for r in records]
    if _seconds_noted(records) is None:
        return [(min(times), max(times))] if times else None
    merged: list[tuple[float, float]] = []
    for start, end in sorted((r.time_seconds - float(r.extra["seconds"]), r.time_seconds) for r in records):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged or None


def _recent_rate(records: Collection[CommitRecord], spells: list[tuple[float, float]] | None) -> float | None:
    """Rows per second of the last stretch of work: `_RECENT_SECONDS`, or three of the longest units."""
    if spells is None:
        return None
    noted = _seconds_noted(records)
    if noted is None:
        # One spell, and the first unit only marks its start: its rows do not count.
        rows = sum(len(r.num_tokens) for r in records) * (len(records) - 1) / len(records)
        seconds = spells[0][1] - spells[0][0]
        return rows / seconds if seconds > 0 and rows else None
    wanted, active = max(_RECENT_SECONDS, 3 * max(noted)), 0.0
    since = spells[0][0]
    for start, end in reversed(spells):
        if active + end - start >= wanted:
            since = end - (wanted - active)
            active = wanted
            break
        active += end - start
    rows = sum(len(r.num_tokens) for r in records if r.time_seconds > since)
    return rows / active if active > 0 else None
