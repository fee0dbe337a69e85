"""Writes that fail at each system call leave no record and resume once the cause is gone; bad places fail early."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import time

import numpy as np
import pytest

import potstill.storage.files.paths as paths
from potstill.storage import (
    SparseTargets,
    StoreError,
    StoreExistsError,
    StoreReader,
    StoreWriter,
    TargetsRow,
    TokensRow,
    WriteFailedError,
    collect_garbage,
    seal_store,
    store_status,
    token_digest,
    verify_store,
)
from potstill.storage.files.commit import record_name
from tests.storage.stores import make_targets_row, same_targets, targets_spec, tokens_spec, write_tokens

NUM_ROWS = 8
REAL_OPEN = os.open


@pytest.fixture
def half(tmp_path):
    """A store of two units, one committed; and the rows of both."""
    tokens = write_tokens(tmp_path / "t", NUM_ROWS)
    spec = targets_spec(NUM_ROWS, tokens.digest)
    writer = StoreWriter.create(tmp_path / "d", spec)
    rows = {u: [make_targets_row(tokens.row(r), spec) for r in writer.unit_rows(u)] for u in range(2)}
    writer.commit_unit(0, rows[0])
    return tmp_path / "d", writer, rows


class FaultyCall:
    """Fails the n-th call of one function of `os` with an error number; counts all, of `open` only those of a write."""

    def __init__(self, monkeypatch, name, fail_at, code):
        self.calls, self.fail_at, self.code, self.real = 0, fail_at, code, getattr(os, name)
        monkeypatch.setattr(paths.os, name, self)

    def __call__(self, *args, **kwargs):
        if self.real is REAL_OPEN and not args[1] & (os.O_WRONLY | os.O_DIRECTORY):
            return self.real(*args, **kwargs)
        self.calls += 1
        if self.fail_at is not None and self.calls >= self.fail_at:
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["write", "fsync", "open", "rename", "link"])
def test_each_failing_call_gives_a_clear_error_no_record_and_a_clean_resume(half, monkeypatch, call, code):
    store, writer, rows = half
    for fail_at in range(1, 20):
        message = None
        with monkeypatch.context() as patch:
            FaultyCall(patch, call, fail_at, code)
            try:
                writer.commit_unit(1, rows[1])
            except WriteFailedError as error:
                message = str(error)
        if message is None:
            break
        assert errno.errorcode[code] in message and "run again" in message
        if writer.todo() == []:
            # Only the folder sync behind the finished record failed.
            assert call in ("fsync", "open")
            break
        assert not list(store.glob("units/u0000001*.json"))
    assert fail_at > 1 or call in ("rename", "link")
    for unit in writer.todo():
        assert writer.commit_unit(unit, rows[unit])
    seal_store(store)
    assert verify_store(store, deep=True).ok


def test_failed_fsync_is_fatal_and_never_retried(half, monkeypatch):
    store, writer, rows = half
    with monkeypatch.context() as patch:
        fault = FaultyCall(patch, "fsync", 1, errno.EIO)
        with pytest.raises(WriteFailedError, match="EIO"):
            writer.commit_unit(1, rows[1])
        assert fault.calls == 1
    assert writer.todo() == [1] and not list(store.glob("tmp/*"))


def test_short_writes_are_continued(half, monkeypatch):
    store, writer, rows = half
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(paths.os, "write", lambda fd, data: real(fd, bytes(data[:1000])))
        assert writer.commit_unit(1, rows[1])
    seal_store(store)
    assert verify_store(store, deep=True).ok


def test_file_system_without_hard_links(half, monkeypatch):
    store, writer, rows = half
    with monkeypatch.context() as patch:
        FaultyCall(patch, "link", 1, errno.EPERM)
        assert writer.commit_unit(1, rows[1])
        assert not writer.commit_unit(1, rows[1])
        seal_store(store)
    assert verify_store(store, deep=True).ok


def test_torn_record_counts_as_not_committed_and_is_stepped_over(half):
    """A file system without links can leave half a record; the next attempt commits beside it."""
    store, writer, rows = half
    record = store / "units" / record_name(0)
    whole = record.read_bytes()
    for torn in (b"", whole[:40], whole[:-3]):
        record.write_bytes(torn)
        assert writer.todo() == [0, 1] and list(writer.committed()) == []
    assert writer.commit_unit(0, rows[0]) and (store / "units" / record_name(0, 1)).exists()
    assert writer.todo() == [1] and not writer.commit_unit(0, rows[0])
    writer.commit_unit(1, rows[1])
    seal_store(store)
    assert verify_store(store, deep=True).ok
    report = collect_garbage(store, dry_run=True)
    assert len(report.files) == 1 and len(list(store.glob("units/*.arrow"))) == 3
    assert collect_garbage(store, dry_run=False).files == report.files
    assert collect_garbage(store, dry_run=False).files == () and verify_store(store, deep=True).ok


@pytest.mark.parametrize("step", ["record", "folder", "index", "manifest"])
def test_a_stop_between_any_two_steps_is_completed_by_a_rerun(half, monkeypatch, step):
    """The process ends between data and record, record and folder sync, or during the seal; nothing is by hand."""
    store, writer, rows = half

    class Stopped(BaseException):
        pass

    def stop(*args, **kwargs):
        raise Stopped

    with monkeypatch.context() as patch:
        if step == "record":
            patch.setattr(paths.LocalFolder, "create", stop)
        elif step == "folder":
            patch.setattr(paths.LocalFolder, "_link", lambda self, tmp, final: os.link(tmp, final) or stop())
        with pytest.raises(Stopped) if step in ("record", "folder") else _nothing():
            writer.commit_unit(1, rows[1])
    again = StoreWriter.create(store, writer.spec)
    for unit in again.todo():
        again.commit_unit(unit, rows[unit])
    with monkeypatch.context() as patch:
        create = paths.LocalFolder.create
        name = {"index": "index.arrow", "manifest": "manifest.json"}.get(step, "none")
        patch.setattr(paths.LocalFolder, "create", lambda self, n, data: stop() if n == name else create(self, n, data))
        if step == "index":
            patch.setattr(paths.LocalFolder, "create_file", stop)
        with pytest.raises(Stopped) if step in ("index", "manifest") else _nothing():
            seal_store(store)
    seal_store(store)
    reader = StoreReader(store)
    assert verify_store(store, deep=True).ok and [reader.row(r).row for r in range(NUM_ROWS)] == list(range(NUM_ROWS))


def _nothing():
    return contextlib.nullcontext()


def test_different_content_for_one_unit_one_attempt_wins(tmp_path):
    """A nondeterministic teacher: two attempts with other bytes; the sealed digest is that of the winner."""
    tokens = write_tokens(tmp_path / "t", NUM_ROWS)
    spec = targets_spec(NUM_ROWS, tokens.digest)
    a, b = (StoreWriter.create(tmp_path / "d", spec) for _ in range(2))
    mine = {u: [make_targets_row(tokens.row(r), spec, seed=1) for r in a.unit_rows(u)] for u in (0, 1)}
    theirs = {u: [make_targets_row(tokens.row(r), spec, seed=2) for r in a.unit_rows(u)] for u in (0, 1)}
    assert a.commit_unit(0, mine[0]) and not b.commit_unit(0, theirs[0])
    assert b.commit_unit(1, theirs[1]) and not a.commit_unit(1, mine[1])
    seal_store(tmp_path / "d")
    reader = StoreReader(tmp_path / "d")
    np_same = same_targets(reader.row(0).targets, reader.row(0).targets)
    assert np_same and (reader.row(0).targets.ids == mine[0][0].targets.ids).all()
    assert (reader.row(4).targets.ids == theirs[1][0].targets.ids).all()
    assert verify_store(tmp_path / "d", deep=True).ok and len(list((tmp_path / "d/units").glob("*.arrow"))) == 2


def test_clocks_do_not_matter(half, monkeypatch):
    store, writer, rows = half
    now = time.time()
    monkeypatch.setattr("potstill.storage.store.writer.time.time", lambda: now - 86_400)
    assert writer.commit_unit(1, rows[1])
    digest = seal_store(store).store_digest
    assert store_status(store).committed == 2 and verify_store(store, deep=True).ok
    monkeypatch.setattr("potstill.storage.store.writer.time.time", lambda: now + 86_400)
    assert not writer.commit_unit(1, rows[1]) and StoreReader(store).digest == digest


def test_bad_places_fail_before_any_work(tmp_path):
    spec = tokens_spec()
    (tmp_path / "file").write_text("x")
    with pytest.raises((WriteFailedError, StoreExistsError), match=r"is not a folder|is a file"):
        StoreWriter.create(tmp_path / "file", spec)
    locked = tmp_path / "locked"
    StoreWriter.create(locked, spec)
    if os.geteuid() == 0:
        return  # root may write anywhere; the failing system calls above stand in for it
    locked.chmod(0o555)
    (locked / "tmp").chmod(0o555)
    try:
        with pytest.raises(WriteFailedError, match="EACCES"):
            StoreWriter.create(locked, spec)
    finally:
        locked.chmod(0o755)
        (locked / "tmp").chmod(0o755)


def test_read_only_file_system_fails_at_create(tmp_path, monkeypatch):
    StoreWriter.create(tmp_path / "d", tokens_spec())
    FaultyCall(monkeypatch, "open", 1, errno.EROFS)
    with pytest.raises(WriteFailedError, match="EROFS"):
        StoreWriter.create(tmp_path / "d", tokens_spec())


def test_rows_are_refused_by_rule(half):
    _, writer, rows = half
    good = rows[1]
    bad_targets = dataclasses.replace(good[0].targets, log_tail=np.full(32, np.nan, np.float32))
    cases = [
        (good[:3], "unit holds the rows 4..7 in order, found 3"),
        ([good[1], good[0], *good[2:]], "in order"),
        ([dataclasses.replace(good[0], stats={})], "in order"),
        ([dataclasses.replace(good[0], stats={}), *good[1:]], r"row 4: statistics \[\]"),
        ([dataclasses.replace(good[0], stats={"mean_loss": float("nan")}), *good[1:]], "row 4: statistic mean_loss"),
        ([dataclasses.replace(good[0], token_digest=-1), *good[1:]], "row 4: token digest"),
        ([dataclasses.replace(good[0], targets=bad_targets), *good[1:]], "row 4: log_tail: token 0 holds nan"),
        ([TokensRow(4, np.zeros(3, np.int32), np.array([3], np.int32)), *good[1:]], "row 4: found a TokensRow"),
    ]
    for bad, message in cases:
        with pytest.raises(StoreError, match=message):
            writer.commit_unit(1, bad)
    assert writer.todo() == [1]
    with pytest.raises(StoreError, match="unit 2 does not exist"):
        writer.unit_rows(2)


@pytest.mark.parametrize(
    ("tokens", "doc_lens", "message"),
    [
        ([1, 2, 1000], [3], "token ids 1..1000"),
        ([1, -2, 5], [3], "token ids -2..5"),
        ([1, 2, 3], [2], "sum to 3"),
        ([1, 2, 3], [3, 0], "leave empty documents out"),
        ([1] * 33, [33], "33 tokens, expected 1..32"),
        ([], [], "0 tokens"),
    ],
)
def test_token_rows_are_refused_by_rule(tmp_path, tokens, doc_lens, message):
    writer = StoreWriter.create(tmp_path / "t", tokens_spec())
    with pytest.raises(StoreError, match=f"row 0: .*{message}"):
        writer.commit_unit(0, [TokensRow(0, np.array(tokens, np.int32), np.array(doc_lens, np.int32))])


def test_one_token_documents_and_rows_without_targets(tmp_path):
    writer = StoreWriter.create(tmp_path / "t", tokens_spec())
    row = TokensRow(0, np.arange(5, dtype=np.int32), np.ones(5, np.int32))
    writer.commit_unit(0, [row])
    seal_store(tmp_path / "t")
    tokens = StoreReader(tmp_path / "t")
    assert tokens.row(0).doc_lens.tolist() == [1] * 5
    writer = StoreWriter.create(tmp_path / "d", targets_spec(1, tokens.digest, stats=()))
    none = SparseTargets.empty(5, spec=writer.spec)
    writer.commit_unit(0, [TargetsRow(0, token_digest(row.tokens, row.doc_lens), none)])
    seal_store(tmp_path / "d")
    found = StoreReader(tmp_path / "d").row(0)
    assert same_targets(found.targets, none) and verify_store(tmp_path / "d", deep=True).ok
