"""Stores of many units, with "many" set low: what is presumed by name, what is read all the same, and what it costs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from potstill.storage import (
    CorruptError,
    StoreWriter,
    UnsealedError,
    repair_store,
    seal_store,
    store_status,
    verify_store,
)
from potstill.storage.files import commit
from potstill.storage.files.checked_json import dump_checked
from potstill.storage.files.commit import CommitRecord, parse_record
from potstill.storage.files.ipc_layout import parse_footer
from potstill.storage.files.paths import LocalFolder
from potstill.storage.store import gathering, index_file, presence, status
from potstill.storage.store.index import encode_index
from potstill.storage.store.index_file import IndexWriter, build_columns
from potstill.storage.store.notes import note_refused
from potstill.storage.store.record_block import RecordBlock, parse_bodies, read_blocks
from tests.storage.stores import make_targets_row, targets_spec, write_targets, write_tokens

NUM_UNITS = 6
NUM_ROWS = 4 * NUM_UNITS - 1
ROOT = Path(__file__).parents[2]


@pytest.fixture
def many(monkeypatch):
    """From here on six units are many."""
    monkeypatch.setattr(presence, "FEW_LOCAL", 2)
    monkeypatch.setattr(status, "_FEW", 2)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("many") / "t", NUM_ROWS)


@pytest.fixture(scope="module")
def whole(tokens, tmp_path_factory):
    return write_targets(tmp_path_factory.mktemp("many") / "whole", tokens)


def rows_of(writer, tokens, unit):
    return [make_targets_row(tokens.row(row), writer.spec) for row in writer.unit_rows(unit)]


def written(path, tokens, *, units=range(NUM_UNITS), extra=None):
    """A store of some units that is not sealed."""
    writer = StoreWriter.create(path, targets_spec(NUM_ROWS, tokens.digest))
    for unit in units:
        writer.commit_unit(unit, rows_of(writer, tokens, unit), extra=extra)
    return writer


def opened(path, tokens):
    return StoreWriter.create(path, targets_spec(NUM_ROWS, tokens.digest))


def damage(path, unit):
    """Flip one digit in the middle of a record: its size stays, its checksum does not fit."""
    record = path / "units" / commit.record_name(unit)
    data = bytearray(record.read_bytes())
    data[len(data) // 2] ^= 1
    record.write_bytes(bytes(data))


def test_a_record_that_cannot_be_read_is_made_again_without_a_person(tmp_path, tokens, whole, many):
    """Its name is taken for it until a seal reads it; the note of the seal sends the next worker to look."""
    written(tmp_path / "s", tokens)
    damage(tmp_path / "s", 3)
    assert opened(tmp_path / "s", tokens).todo() == []
    for _ in range(2):  # a second seal before any worker changes nothing
        with pytest.raises(UnsealedError, match=r"1 of 6 units are missing \(first: \[3\]\); run the same dump again"):
            seal_store(tmp_path / "s", fast=True)
        assert len(list((tmp_path / "s" / "failures").iterdir())) == 1
    assert not list((tmp_path / "s" / "tmp").iterdir()), "the index in the making is taken away"
    writer = opened(tmp_path / "s", tokens)
    assert writer.todo() == [3] and writer.todo(worker=1, num_workers=2) == [3]
    assert writer.commit_unit(3, rows_of(writer, tokens, 3)) and writer.todo() == []
    assert opened(tmp_path / "s", tokens).todo() == []
    assert seal_store(tmp_path / "s").store_digest == whole.digest
    assert verify_store(tmp_path / "s", deep=True).ok


def test_an_empty_record_and_one_of_a_later_generation_are_looked_into_at_once(tmp_path, tokens, whole, many):
    written(tmp_path / "s", tokens)
    (tmp_path / "s" / "units" / commit.record_name(4)).write_bytes(b"")
    writer = opened(tmp_path / "s", tokens)
    assert writer.todo() == [4]
    assert writer.commit_unit(4, rows_of(writer, tokens, 4))
    damaged = tmp_path / "s" / "units" / commit.record_name(4, 1)
    good = damaged.read_bytes()
    damaged.write_bytes(good[:-1] + b"x")
    assert opened(tmp_path / "s", tokens).todo() == [4]
    damaged.write_bytes(good)
    assert opened(tmp_path / "s", tokens).todo() == []
    assert seal_store(tmp_path / "s").store_digest == whole.digest


def test_many_units_cost_no_look_into_records(tmp_path, tokens, many, monkeypatch):
    writer = written(tmp_path / "s", tokens, units=(0, 1, 2, 4, 5))
    monkeypatch.setattr(LocalFolder, "read", lambda *a, **b: pytest.fail("a file is read"))
    assert writer.todo() == [3] and writer.num_refused(allowed=0) == 0


def test_repair_takes_out_what_a_name_stood_for(tmp_path, tokens, whole, many):
    written(tmp_path / "s", tokens)
    damage(tmp_path / "s", 2)
    report = repair_store(tmp_path / "s")
    assert report.redo == (2,) and opened(tmp_path / "s", tokens).todo() == [2]
    writer = opened(tmp_path / "s", tokens)
    assert writer.commit_unit(2, rows_of(writer, tokens, 2))
    assert seal_store(tmp_path / "s").store_digest == whole.digest


def test_refused_rows_are_counted_by_notes_and_by_records_when_it_matters(tmp_path, tokens, many):
    writer = written(tmp_path / "s", tokens, units=(0, 1))
    for unit, num_rows in ((2, 2), (3, 1)):
        writer.note_refused(unit, num_rows)
        refused = [[unit * 4 + i, "NaN"] for i in range(num_rows)]
        writer.commit_unit(unit, rows_of(writer, tokens, unit), extra={"refused": refused})
    assert writer.num_refused(allowed=6) == 3
    assert writer.num_refused(allowed=6, except_units={2}) == 1
    note_refused(LocalFolder(tmp_path / "s"), 5, 4)  # of an attempt that was killed before its record
    note_refused(LocalFolder(tmp_path / "s"), 2, 1)  # of one that lost, with fewer
    assert writer.num_refused(allowed=100) == 7, "never too few"
    assert writer.num_refused(allowed=7) == 3, "exact before anything is stopped for it"
    written(tmp_path / "s", tokens)
    seal_store(tmp_path / "s")
    assert verify_store(tmp_path / "s", deep=True).ok
    StoreWriter.create(tmp_path / "s", writer.spec, force=True)
    assert not list((tmp_path / "s" / "refused").iterdir())


def test_status_of_many_units_agrees_with_that_of_all_records(tmp_path, tokens, many, monkeypatch):
    written(tmp_path / "s", tokens, units=(0, 1, 3, 5), extra={"seconds": 2.0})
    (tmp_path / "s" / "units" / "u0000002-00000000000a.arrow").write_bytes(b"an attempt without a record")
    (tmp_path / "s" / "units" / "u0000003-00000000000b.arrow").write_bytes(b"one that lost")
    estimated = store_status(tmp_path / "s")
    monkeypatch.setattr(status, "_FEW", 100)
    exact = store_status(tmp_path / "s")
    assert estimated.estimated and not exact.estimated
    times = {"estimated", "rate_rows_per_second", "eta_seconds", "active_seconds"}
    a, b = asdict(estimated), asdict(exact)
    assert {k: v for k, v in a.items() if k not in times} == {k: v for k, v in b.items() if k not in times}
    assert (exact.committed, exact.rows_committed, exact.missing) == (4, 15, 2)
    for name in ("rate_rows_per_second", "active_seconds"):
        assert a[name] == pytest.approx(b[name], rel=0.2)


def test_status_finds_records_that_look_wrong_and_says_no_times_of_a_copy(tmp_path, tokens, many):
    written(tmp_path / "s", tokens, extra={"seconds": 2.0})
    (tmp_path / "s" / "units" / commit.record_name(4)).write_bytes(b"")
    found = store_status(tmp_path / "s")
    assert (found.committed, found.missing) == (5, 1) and found.rate_rows_per_second
    for file in (tmp_path / "s" / "units").iterdir():
        os.utime(file, (1e9, 1e9))
    copied = store_status(tmp_path / "s")
    assert copied.rate_rows_per_second is None and copied.active_seconds is None and copied.worker_seconds == 10


def made_records(num_units, *, rows=100, stats=("loss", "entropy"), seed=0):
    """Records of rows that nobody has."""
    rng = np.random.default_rng(seed)
    spec = targets_spec(max(0, num_units * rows - 7), "t", rows_per_unit=rows, stats=stats, row_length=64)
    records = []
    for unit in range(num_units):
        n = min(rows, spec.num_rows - unit * rows)
        batches = np.stack(
            [np.arange(n // 2 + 1) * 50, *rng.integers(1, 50, (2, n // 2 + 1)), [2] * (n // 2) + [n % 2]]
        )
        record = CommitRecord(
            unit=unit,
            file=f"u{unit:07d}-{unit:012x}.arrow",
            num_bytes=10_000,
            sha256=f"{unit:064x}",
            first_row=unit * rows,
            batch_table=batches.T[: n // 2 + n % 2],
            num_tokens=rng.integers(1, 65, n),
            num_entries=rng.integers(0, 200, n),
            num_targets=5,
            stats={name: rng.normal(size=n) for name in stats},
            time_seconds=1.5,
            extra={"refused": [[3, "x"]], "figures": {"a": 1.0}} if unit % 3 == 0 else {},
        )
        records.append(replace(record, num_entries=np.minimum(record.num_entries, record.num_tokens)))
    return spec, records


@pytest.mark.parametrize("sizes", [(0, 12), (1, 12), (7, 16), (2, 512), (3, 1024)])
def test_the_index_is_the_same_bytes_as_when_it_was_encoded_at_once(tmp_path, sizes):
    num_units, rows = sizes
    spec, records = made_records(num_units, rows=rows)
    columns = build_columns(records, spec.stats)
    data, blocks = encode_index(columns, spec.fingerprint)
    writer = IndexWriter(tmp_path / "index", spec.stats, spec.fingerprint)
    for piece in [records[i : i + 2] for i in range(0, num_units, 2)]:
        writer.add(index_file.block_columns(RecordBlock.of(piece, spec.stats), spec.stats))
    found = writer.finish()
    assert (tmp_path / "index").read_bytes() == bytes(data) and list(found.blocks) == blocks
    assert found.num_bytes == len(data) and [b[:2] for b in blocks] == parse_footer(data, where="index")


def test_records_at_once_are_the_records_one_by_one(tmp_path):
    spec, records = made_records(40)
    (tmp_path / "units").mkdir()
    for record in records:
        (tmp_path / "units" / commit.record_name(record.unit)).write_bytes(record.to_bytes(spec.fingerprint))
    blocks = list(read_blocks(LocalFolder(tmp_path), spec, dict.fromkeys(range(40), 1)))
    assert [len(block.units) for block in blocks] == [32, 8]
    quick = parse_bodies([r.to_bytes(spec.fingerprint) for r in records[:32]], range(32), spec)
    assert quick is not None, "Arrow takes what the writer writes"
    for block, piece in zip((*blocks, quick), (records[:32], records[32:], records[:32]), strict=True):
        wanted = RecordBlock.of(piece, spec.stats)
        for field in dataclasses.fields(RecordBlock):
            a, b = getattr(block, field.name), getattr(wanted, field.name)
            if field.name == "stats":
                assert all(np.array_equal(a[name], b[name]) for name in spec.stats)
            else:
                assert np.array_equal(a, b), field.name


FORGED = {
    "fingerprint": ("0" * 64, 7, None),
    "unit": (1, "0", 0.0, True, None),
    "file": ("u0000001-000000000000.arrow", "../x", 3, None),
    "bytes": (-1, 10, 1.5, "10000", 1 << 63, None),
    "sha256": (5, None, [1]),
    "first_row": (1, -1, None, 0.5),
    "num_targets": (-1, 1 << 40, None, True),
    "time_seconds": ("now", None, [1]),
    "extra": (None, [], 3, "x"),
    "batches": (None, [], [[1, 2, 3]], [[0, 1, 2, 3, 4]], [[0, 5, 1, None]], [[0.5, 5, 1, 100]], [[0, 1, 1, 99]]),
    "num_tokens": (None, [], [1], [0] * 100, [65] * 100, [1.0] * 100, [True] * 100, [None] * 100, [-1] * 100),
    "num_entries": (None, [1], [-1] * 100, [1 << 33] * 100, [256 * 64] * 100, ["1"] * 100),
    "stats": (None, {}, {"loss": [0.0] * 100}, [1], {"loss": [0.0] * 99, "entropy": [0.0] * 100}, {"loss": 1}),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in FORGED for value in FORGED[key]], ids=str)
def test_what_breaks_a_rule_of_records_is_never_taken_at_once(tmp_path, key, value, caplog):
    """The checksum fits: only the rules can tell. Record by record it is refused, and so it is among others."""
    spec, records = made_records(3)
    bodies = [record.to_bytes(spec.fingerprint) for record in records]
    forged = json.loads(bodies[0]) | {key: value}
    del forged["crc32"]
    with pytest.raises(CorruptError):
        parse_record(forged, unit=0, spec=spec, where="record")
    bodies[0] = dump_checked(forged)
    with contextlib.suppress(pa.ArrowException, ValueError):
        assert parse_bodies(bodies, range(3), spec) is None
    (tmp_path / "units").mkdir()
    for unit, body in enumerate(bodies):
        (tmp_path / "units" / commit.record_name(unit)).write_bytes(body)
    (block,) = read_blocks(LocalFolder(tmp_path), spec, dict.fromkeys(range(3), 1))
    assert block.units.tolist() == [1, 2] and block.unreadable == (0,)
    assert "unit 0 counts as not committed" in caplog.text


def test_a_seal_of_a_store_that_lacks_most_units_reads_nothing(tmp_path, tokens, monkeypatch):
    written(tmp_path / "s", tokens, units=(0, 1))
    monkeypatch.setattr(gathering, "MOST_LATE", 3)
    monkeypatch.setattr(gathering, "read_blocks", lambda *a: pytest.fail("records are read"))
    with pytest.raises(UnsealedError, match=r"4 of 6 units are missing \(first: \[2, 3, 4, 5\]\)"):
        seal_store(tmp_path / "s")
    assert not list((tmp_path / "s" / "tmp").iterdir())


def test_a_full_disk_while_the_index_is_made_is_told(tmp_path, tokens, monkeypatch):
    from potstill.storage import WriteFailedError

    written(tmp_path / "s", tokens)

    def full(self, columns):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(IndexWriter, "add", full)
    with pytest.raises(WriteFailedError, match=r"writing .*/tmp/.* failed: ENOSPC"):
        seal_store(tmp_path / "s")
    assert not list((tmp_path / "s" / "tmp").iterdir()) and not (tmp_path / "s" / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_and_damaged_records_among_many_units_end_well(tmp_path):
    """Writers are killed, a record is damaged after each kill, and the same two commands bring the store to its end."""
    rng = np.random.default_rng(5)
    tokens = write_tokens(tmp_path / "t", 200, rows_per_unit=2)
    reference = write_targets(tmp_path / "reference", tokens)
    store = tmp_path / "store"
    killed = hurt = 0
    for turn in range(40):
        writer = start(tokens, store)
        try:
            if turn < 8:
                wait_for_records(writer, store, more=rng.integers(1, 9))
                killed += writer.poll() is None
            else:
                assert writer.wait(timeout=120) == 0
        finally:
            writer.kill()
            writer.wait()
        if (store / "manifest.json").exists():
            break
        records = sorted((store / "units").glob("*.json")) if turn < 8 else []
        if records:
            picked = records[rng.integers(len(records))]
            data = picked.read_bytes()
            picked.write_bytes(data[: len(data) // 2] if rng.random() < 0.5 else b"\0" * len(data))
            hurt += 1
    assert killed >= 3 and hurt >= 3
    assert seal_store(store).store_digest == reference.digest and verify_store(store, deep=True).ok


def wait_for_records(writer, store, *, more):
    """Until there are so many more than now, or the writer has ended."""
    wanted = len(list(store.glob("units/*.json"))) + more
    deadline = time.monotonic() + 60
    while len(list(store.glob("units/*.json"))) < wanted and writer.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def start(tokens, store):
    command = [sys.executable, "-m", "tests.storage.kill_worker", tokens.url, store, 0, 1, 0, "--few", 3]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([str(c) for c in command], env=env, cwd=ROOT, stdout=subprocess.DEVNULL)
