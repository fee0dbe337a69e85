"""Rows of a store that is still written: those of one committed unit, and how others would come back from it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from potstill.storage.errors import CorruptError
from potstill.storage.files.commit import CommitRecord
from potstill.storage.files.folder import StoreFolder
from potstill.storage.files.unit_file import BatchEntry, DecodedBatch, encode_unit
from potstill.storage.rows.id_map import IdMap
from potstill.storage.rows.row_types import Row
from potstill.storage.store.spec import RunSpec


def rows_of_record(folder: StoreFolder, record: CommitRecord, *, spec: RunSpec, id_map: IdMap | None) -> list[Row]:
    """Every row of a committed unit, in order. Raises CorruptError where its bytes are not those of the record."""
    name = f"units/{record.file}"
    where = f"{folder.url}/{name}"
    data = folder.read(name, max_bytes=record.num_bytes)
    if data is None or hashlib.sha256(data).hexdigest() != record.sha256:
        state = "missing" if data is None else "not the bytes that its record names"
        raise CorruptError(f"{where}: {state}; run `potstill repair {folder.url}`, then this command again")
    stats = [{key: values[i] for key, values in record.stats.items()} for i in range(len(record.rows))]
    return _decoded(data, record.batches, record.rows, stats, spec=spec, id_map=id_map, where=where)


def as_stored(rows: Sequence[Row], *, spec: RunSpec, id_map: IdMap | None) -> list[Row]:
    """What a reader would find of these rows: encoded on the grids of the store and decoded again."""
    if not rows:
        return []
    encoded = encode_unit(rows, spec=spec, unit=rows[0].row // spec.rows_per_unit, id_map=id_map)
    stats = [{} if not hasattr(row, "stats") else dict(row.stats) for row in rows]
    numbers = [row.row for row in rows]
    return _decoded(encoded.data, encoded.batches, numbers, stats, spec=spec, id_map=id_map, where="rows of memory")


def _decoded(
    data: bytes | memoryview,
    batches: Sequence[BatchEntry],
    numbers: Sequence[int],
    stats: Sequence[dict[str, float]],
    *,
    spec: RunSpec,
    id_map: IdMap | None,
    where: str,
) -> list[Row]:
    found: list[Row] = []
    for entry in batches:
        batch = DecodedBatch(memoryview(data)[entry.offset : entry.offset + entry.length], spec=spec, where=where)
        for position in range(entry.num_rows):
            place = len(found)
            found.append(batch.decode(position, row=numbers[place], stats=stats[place], id_map=id_map))
    return found
