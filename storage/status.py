"""store_status: how far a store is, from its files alone (nothing that runs is asked)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from potstill.storage.commit import committed_records
from potstill.storage.paths import StorePath, open_folder
from potstill.storage.seal import load_manifest
from potstill.storage.writer import load_spec

_FAILURE = re.compile(r"u(\d{7,12})-[0-9a-f]{12}\.json")


@dataclass(frozen=True, kw_only=True)
class StoreStatus:
    """Counts of units and rows. `failed` units have a failure note and no record; `missing` includes them.

    The rate is taken from the times in the records and is for people only; None when they do not tell. worker_seconds
    adds up what workers noted as `extra.seconds` of the units they committed; None when a record has no such note.
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
    times = sorted(r.time_seconds for r in records.values())
    rate = None
    if len(times) > 1 and times[-1] > times[0]:
        # The first unit marks the start, so its rows do not count.
        rate = rows * (len(times) - 1) / len(times) / (times[-1] - times[0])
    spent = [float(r.extra["seconds"]) for r in records.values() if isinstance(r.extra.get("seconds"), int | float)]
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
        worker_seconds=sum(spent) if spent and len(spent) == len(records) else None,
        bytes=sum(r.num_bytes for r in records.values()),
    )
