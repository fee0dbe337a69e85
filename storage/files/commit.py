"""Commit records: the only commit point. No locks, leases or clocks; to do = units without a readable record."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.storage.errors import CorruptError
from potstill.storage.files.checked_json import dump_checked, get_int, get_list, get_text, read_checked
from potstill.storage.files.folder import StoreFolder
from potstill.storage.files.prefetch import in_parallel
from potstill.storage.files.unit_file import BatchEntry
from potstill.storage.store.spec import RunSpec

logger = logging.getLogger(__name__)

MAX_RECORD_BYTES = 1 << 30
MAX_RECORD_BASE_BYTES, MAX_RECORD_ROW_BYTES = 64 << 20, 4096  # what any record, and each of its rows, may take
MAX_GENERATIONS = 1000
LISTED_AT_ONCE = 32  # parts of units/ that are listed side by side
_RECORD_NAME = re.compile(r"u(\d{7,12})(?:\.(\d{1,4}))?\.json")
_FILE_NAME = re.compile(r"u(\d{7,12})-[0-9a-f]{12}\.arrow")


@dataclass(frozen=True, kw_only=True, eq=False)
class CommitRecord:
    """What one committed unit holds. `rows` are its row numbers; arrays run over its rows in order.

    batch_table [B, 4] int64: offset, length, crc32 and rows of each record batch. num_tokens and num_entries [n] are
    int64, each of stats [n] float64: arrays, because there may be as many rows as a corpus has.
    """

    unit: int
    file: str
    num_bytes: int
    sha256: str
    first_row: int
    batch_table: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    num_entries: NDArray[np.int64]
    num_targets: int
    stats: Mapping[str, NDArray[np.float64]]
    time_seconds: float
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> range:
        return range(self.first_row, self.first_row + len(self.num_tokens))

    @property
    def batches(self) -> tuple[BatchEntry, ...]:
        return tuple(BatchEntry(*entry) for entry in self.batch_table.tolist())

    def to_bytes(self, fingerprint: str) -> bytes:
        """Checked JSON as written to units/."""
        return dump_checked(
            {
                "fingerprint": fingerprint,
                "unit": self.unit,
                "file": self.file,
                "bytes": self.num_bytes,
                "sha256": self.sha256,
                "first_row": self.first_row,
                "batches": self.batch_table.tolist(),
                "num_tokens": self.num_tokens.tolist(),
                "num_entries": self.num_entries.tolist(),
                "num_targets": self.num_targets,
                "stats": {name: values.tolist() for name, values in self.stats.items()},
                "time_seconds": self.time_seconds,
                "extra": dict(self.extra),
            }
        )


def record_name(unit: int, generation: int = 0) -> str:
    """Name of a unit's record; generations above 0 exist only where an earlier record is unreadable."""
    return f"u{unit:07d}.json" if generation == 0 else f"u{unit:07d}.{generation}.json"


def is_file_of(name: str, unit: int) -> bool:
    """Whether a file in units/ is named as an attempt at this unit is."""
    match = _FILE_NAME.fullmatch(name)
    return match is not None and int(match.group(1)) == unit


def max_record_bytes(spec: RunSpec) -> int:
    """Bytes above which no file is a record of this run: it is not read into memory."""
    return min(MAX_RECORD_BYTES, MAX_RECORD_BASE_BYTES + MAX_RECORD_ROW_BYTES * spec.rows_per_unit)


def parse_record(value: Mapping[str, Any], *, unit: int, spec: RunSpec, where: str) -> CommitRecord:
    """Check every field against the run; CorruptError on the first that does not fit."""
    if get_text(value, "fingerprint", where=where) != spec.fingerprint:
        raise CorruptError(f"{where}: record belongs to another run (fingerprint {value['fingerprint'][:16]}...)")
    if get_int(value, "unit", where=where) != unit:
        raise CorruptError(f"{where}: record is of unit {value['unit']}, expected unit {unit}")
    file = get_text(value, "file", where=where)
    if not is_file_of(file, unit):
        raise CorruptError(f"{where}: file name {file!r} is not that of an attempt at unit {unit}")
    num_bytes = get_int(value, "bytes", where=where)
    num_tokens, num_entries = (_ints(value, key, where=where) for key in ("num_tokens", "num_entries"))
    first_row = get_int(value, "first_row", where=where)
    if first_row != unit * spec.rows_per_unit or not 1 <= len(num_tokens) <= spec.rows_per_unit:
        raise CorruptError(f"{where}: rows {first_row}+{len(num_tokens)} are not those of unit {unit}")
    if len(num_entries) != len(num_tokens) or num_tokens.max() > spec.row_length or num_tokens.min() < 1:
        raise CorruptError(f"{where}: row sizes do not fit the row length {spec.row_length}")
    if (num_entries > 255 * num_tokens).any():
        raise CorruptError(f"{where}: a row has more than 255 entries per token")
    time_seconds: Any = value.get("time_seconds")
    extra: Any = value.get("extra")
    if type(time_seconds) not in (int, float) or not isinstance(extra, dict):
        raise CorruptError(f"{where}: time_seconds must be a number and extra a map")
    return CommitRecord(
        unit=unit,
        file=file,
        num_bytes=num_bytes,
        sha256=get_text(value, "sha256", where=where),
        first_row=first_row,
        batch_table=_batches(value, num_bytes, len(num_tokens), where=where),
        num_tokens=num_tokens,
        num_entries=num_entries,
        num_targets=get_int(value, "num_targets", where=where, high=int(num_tokens.sum())),
        stats=_stats(value, spec, len(num_tokens), where=where),
        time_seconds=float(time_seconds),
        extra=extra,
    )


def read_record(
    folder: StoreFolder, unit: int, spec: RunSpec, *, generations: int = 1, to_the_end: bool = False
) -> CommitRecord | None:
    """The unit's first readable record among its generations, or None; unreadable ones are logged.

    `to_the_end`: the first generation that is not there is taken for the end of them.
    """
    for generation in range(generations):
        name = f"units/{record_name(unit, generation)}"
        try:
            value = read_checked(folder, name, max_bytes=max_record_bytes(spec))
            if value is not None:
                return parse_record(value, unit=unit, spec=spec, where=f"{folder.url}/{name}")
            if to_the_end:
                return None
        except CorruptError as error:
            logger.warning("unit %d counts as not committed: %s", unit, error)
    return None


def unit_cuts(spec: RunSpec) -> list[str]:
    """Names in units/ between which the objects of a store lie about evenly, for `StoreFolder.names`."""
    if spec.num_rows is not None:
        num_units = -(-spec.num_rows // spec.rows_per_unit)
        numbers = [num_units * part // LISTED_AT_ONCE for part in range(1, LISTED_AT_ONCE)]
    else:  # of unknown length: closer at first, so that no part holds more than a third of what there is
        numbers = [part << power for power in range(9, 22) for part in (2, 3)]
    return [record_name(unit) for unit in numbers]


def list_records(folder: StoreFolder, spec: RunSpec | None = None) -> dict[int, int]:
    """Unit -> number of record generations to try, from one listing; `spec` makes it quick for many units."""
    return generations_of(folder.names("units", cuts=() if spec is None else unit_cuts(spec)))


def generations_of(names: Iterable[str]) -> dict[int, int]:
    """Unit -> number of record generations to try, of those among the names that are records; in order."""
    found: dict[int, int] = {}
    for name in names:
        match = _RECORD_NAME.fullmatch(name)
        if match:
            unit, generation = int(match.group(1)), int(match.group(2) or 0)
            found[unit] = max(found.get(unit, 0), generation + 1)
    return dict(sorted(found.items()))


def record_unit(name: str) -> int | None:
    """The unit whose record a file in units/ is by its name, None for other files."""
    match = _RECORD_NAME.fullmatch(name)
    return None if match is None else int(match.group(1))


def has_records(folder: StoreFolder) -> bool:
    """Whether any unit has a record, readable or not; one that a listing does not show yet is asked for by name."""
    return folder.size(f"units/{record_name(0)}") is not None or bool(list_records(folder))


def committed_records(folder: StoreFolder, spec: RunSpec) -> dict[int, CommitRecord]:
    """All readable records by unit; read by several threads where each read is a request over a network."""
    listed = list_records(folder, spec)

    def read(unit: int) -> CommitRecord | None:
        return read_record(folder, unit, spec, generations=listed[unit])

    if folder.parallel_reads == 1:
        records = [read(unit) for unit in listed]
    else:
        records = in_parallel([partial(read, unit) for unit in listed], num_threads=folder.parallel_reads)
    return {record.unit: record for record in records if record is not None}


def _ints(value: Mapping[str, Any], key: str, *, where: str) -> NDArray[np.int64]:
    items = get_list(value, key, where=where)
    if not set(map(type, items)) <= {int} or min(items, default=0) < 0 or max(items, default=0) >= 1 << 32:
        raise CorruptError(f"{where}: field {key!r} must hold counts")
    return np.array(items, np.int64)


def _batches(value: Mapping[str, Any], num_bytes: int, num_rows: int, *, where: str) -> NDArray[np.int64]:
    entries: list[BatchEntry] = []
    items = get_list(value, "batches", where=where)
    for item in items:
        if not (isinstance(item, list) and len(item) == 4 and all(type(x) is int and x >= 0 for x in item)):
            raise CorruptError(f"{where}: batch entry {item!r} must be [offset, length, crc32, rows]")
        entry = BatchEntry(*item)
        if entry.offset + entry.length > num_bytes or entry.length >= 1 << 32 or entry.crc32 >= 1 << 32:
            raise CorruptError(f"{where}: batch entry {item!r} lies outside the file of {num_bytes} bytes")
        entries.append(entry)
    if sum(entry.num_rows for entry in entries) != num_rows:
        raise CorruptError(f"{where}: batches do not hold the {num_rows} rows of the unit")
    return np.array(items, np.int64).reshape(-1, 4)


def _stats(value: Mapping[str, Any], spec: RunSpec, num_rows: int, *, where: str) -> dict[str, NDArray[np.float64]]:
    stats = value.get("stats")
    if not isinstance(stats, dict) or set(stats) != set(spec.stats):
        raise CorruptError(f"{where}: statistics do not have the names {spec.stats}")
    for name, values in stats.items():
        if not isinstance(values, list) or len(values) != num_rows or not set(map(type, values)) <= {int, float}:
            raise CorruptError(f"{where}: statistic {name!r} must hold one number per row")
    return {name: np.array([float(v) for v in stats[name]], np.float64) for name in spec.stats}
