"""repair in an object store: moved by copy and delete; nothing is moved while the server does not answer."""

from __future__ import annotations

import pytest

pytest.importorskip("moto.server")
pytest.importorskip("obstore")

from potstill.storage import ReadFailedError, StoreReader, StoreWriter, repair_store, seal_store, verify_store
from potstill.storage.files.paths import open_folder
from tests.storage.stores import make_targets_row, targets_spec
from tests.storage.test_objects import NUM_ROWS, environment, local, s3

__all__ = ["environment", "local", "s3"]  # fixtures


def write(url, tokens):
    spec = targets_spec(NUM_ROWS, tokens.digest)
    writer = StoreWriter.create(url, spec)
    for unit in writer.todo():
        writer.commit_unit(unit, [make_targets_row(row, spec) for row in tokens.tokens_rows(writer.unit_rows(unit))])
    return seal_store(url).store_digest


def unit_name(folder, unit):
    return next(f"units/{name}" for name in folder.names("units") if name.startswith(f"u{unit:07d}-"))


def test_damaged_and_missing_objects_are_made_again(s3, local):
    url, tokens = "s3://bucket/repaired/store", local[0]
    digest = write(url, tokens)
    folder = open_folder(url)
    first, second = unit_name(folder, 0), unit_name(folder, 1)
    data = bytearray(folder.read(first, max_bytes=1 << 20))
    data[len(data) // 2] ^= 1
    folder.put(first, bytes(data))
    folder.delete(second)
    assert [found.kind for found in verify_store(url, deep=True).findings] == ["bytes", "missing"]
    report = repair_store(url)
    assert report.redo == (0, 1)
    moved = dict(report.moved)
    assert folder.read(moved[first], max_bytes=1 << 20) == bytes(data) and folder.size(first) is None
    assert len(folder.names("quarantine")) == len(moved)
    assert write(url, tokens) == digest == StoreReader(url).digest
    assert verify_store(url, deep=True).ok and repair_store(url).whole


def test_a_server_that_does_not_answer_is_no_damage(s3, local):
    url = "s3://bucket/silent/store"
    write(url, local[0])
    folder = open_folder(url)
    before = folder.names("units")
    s3.fault = lambda method, path, number: "503" if "/u0000001-" in path else None
    try:
        with pytest.raises(ReadFailedError, match="nothing was changed"):
            repair_store(url)
    finally:
        s3.fault = lambda method, path, number: None
    assert folder.names("units") == before and repair_store(url).whole
