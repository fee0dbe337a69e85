"""repair takes out what is damaged; what is made again has the digest of the undamaged store, also after kills."""

from __future__ import annotations

import contextlib
import random
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

import potstill.storage.files.paths as paths
from potstill.storage import (
    CorruptError,
    MismatchError,
    ReadFailedError,
    StoreReader,
    StoreWriter,
    UnsealedError,
    check_sealed,
    collect_garbage,
    repair_store,
    seal_store,
    store_status,
    verify_store,
)
from potstill.storage.store.repair import _Repair
from tests.campaign import tell
from tests.storage.damage import KINDS, flip, make_again, record_file, swap, unit_file
from tests.storage.stores import make_targets_row, make_tokens_row, tokens_spec, write_targets, write_tokens

NUM_ROWS = 20  # five units


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The tokens, the store over them, and one of other options."""
    root = tmp_path_factory.mktemp("repair")
    tokens = write_tokens(root / "t", NUM_ROWS)
    return tokens, Path(write_targets(root / "d", tokens).url), Path(write_targets(root / "o", tokens, stats=()).url)


@pytest.fixture
def store(originals, tmp_path):
    shutil.copytree(originals[1], tmp_path / "store")
    return tmp_path / "store"


def files_of(store):
    return {path.relative_to(store): path.lstat().st_ino for path in store.rglob("*") if path.parent.name != "tmp"}


@pytest.mark.parametrize("kind", KINDS)
def test_each_damage_is_taken_out_and_made_again(originals, store, kind):
    tokens, original, foreign = originals
    KINDS[kind](store, 3, foreign, random.Random(kind))
    before = files_of(store)
    dry = repair_store(store, dry_run=True)
    assert dry.findings and files_of(store) == before
    report = repair_store(store)
    assert report.findings == dry.findings and report.redo == dry.redo and not report.sealed
    assert [old for old, _ in report.moved] == [old for old, _ in dry.moved]
    # Nothing is deleted: every file is where it was, or in the quarantine.
    assert {inode for path, inode in before.items() if len(path.parts) > 1 or "." in path.name} <= set(
        files_of(store).values()
    )
    assert all((store / new).exists() or (store / new).is_symlink() for _, new in report.moved)
    assert [unit for unit in report.redo if list((store / "units").glob(f"u{unit:07d}*"))] == []
    again = repair_store(store)
    assert again.findings == () and again.moved == ()
    assert make_again(store, tokens) == StoreReader(original).digest
    assert verify_store(store, deep=True).ok and repair_store(store).whole
    assert collect_garbage(store, dry_run=False).num_bytes >= 0
    assert all((store / new).exists() or (store / new).is_symlink() for _, new in report.moved)
    assert store_status(store).failed == 0


def test_a_sound_store_is_left_alone(originals, store):
    before = files_of(store)
    report = repair_store(store)
    assert report.whole and report.moved == () and files_of(store) == before


def test_until_it_is_repaired_seal_and_workers_say_what_to_run(store):
    unit_file(store, 1).unlink()
    for fast in (False, True):
        with pytest.raises(CorruptError, match=rf"unit 1: .* is missing.*potstill repair {store}"):
            seal_store(store, fast=fast)
    with pytest.raises(CorruptError, match=f"potstill repair {store}"):
        check_sealed(store)
    repair_store(store)
    assert check_sealed(store) is False
    with pytest.raises(UnsealedError, match=r"1 of 5 units are missing \(first: \[1\]\)"):
        seal_store(store)


@pytest.mark.parametrize("kind", ["missing record", "flipped index", "missing index", "all zeros"])
def test_a_seal_of_a_sealed_store_sees_damage(originals, store, kind):
    KINDS[kind](store, 2, originals[2], random.Random(0))
    with pytest.raises(CorruptError, match="potstill repair"):
        seal_store(store, again=True)
    if kind in ("all zeros", "flipped index"):
        check_sealed(store)  # costs no bytes
    else:
        with pytest.raises(CorruptError, match=f"potstill repair {store}"):
            check_sealed(store)


def test_a_short_manifest_is_that_of_a_killed_seal_and_replaced(originals, store, caplog):
    digest = StoreReader(store).digest
    KINDS["short manifest"](store, 2, originals[2], random.Random(0))
    assert check_sealed(store) is False
    assert seal_store(store, again=True).store_digest == digest == StoreReader(store).digest
    assert "the store is sealed again" in caplog.text


def test_seal_reads_the_bytes_back_unless_told_not_to(store):
    digest = StoreReader(store).digest
    for name in ("manifest.json", "index.arrow"):
        (store / name).unlink()
    whole = unit_file(store, 2).read_bytes()
    unit_file(store, 2).write_bytes(bytes(len(whole)))
    with pytest.raises(CorruptError, match=r"1 of 5 units are damaged: unit 2: content of units/u0000002-.*sha256"):
        seal_store(store)
    assert not (store / "manifest.json").exists()
    assert seal_store(store, fast=True).bytes_checked is False
    assert "--fast" in verify_store(store, deep=False).format()
    (store / "manifest.json").unlink()
    unit_file(store, 2).write_bytes(whole)
    manifest = seal_store(store)
    assert manifest.bytes_checked is True and manifest.store_digest == digest


def test_a_store_of_open_length_is_not_sealed_shorter(tmp_path):
    """Its last unit is taken out, and nothing but the note in failures/ tells that there was one."""
    tokens = write_tokens(tmp_path / "t", 10)
    store = tmp_path / "t"
    flip(unit_file(store, 2), random.Random(1))
    assert repair_store(store).redo == (2,)
    with pytest.raises(UnsealedError, match="1 of 3 units are missing"):
        seal_store(store)
    spec = tokens_spec()
    StoreWriter.create(store, spec).commit_unit(2, [make_tokens_row(row, spec) for row in (8, 9)])
    assert seal_store(store).store_digest == tokens.digest


def test_files_that_may_not_be_read_are_no_damage(store, monkeypatch):
    real = paths.os.open

    def refuse(path, *args, **kwargs):
        if "u0000002-" in str(path):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(paths.os, "open", refuse)
    monkeypatch.setattr("builtins.open", refuse_open(open))
    before = files_of(store)
    with pytest.raises(ReadFailedError, match=r"1 files could not be read.*nothing was changed"):
        repair_store(store)
    assert files_of(store) == before


def refuse_open(real):
    def opened(path, *args, **kwargs):
        if "u0000002-" in str(path):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    return opened


@pytest.mark.parametrize("sealed", [True, False])
def test_a_damaged_run_json_is_written_anew_by_the_same_run_only(originals, store, sealed):
    original = originals[1]
    spec = StoreReader(original).spec
    if not sealed:
        (store / "manifest.json").unlink()
    flip(store / "run.json", random.Random(0))
    with pytest.raises(CorruptError, match="would be moved to quarantine"):
        repair_store(store, dry_run=True)
    assert (store / "run.json").exists()
    with pytest.raises(CorruptError, match=rf"It was moved to quarantine/.*run.json.*their run: {spec.fingerprint}"):
        repair_store(store)
    units = files_of(store / "units")
    with pytest.raises(MismatchError, match=f"the units are of the run {spec.fingerprint}"):
        StoreWriter.create(store, replace(spec, stats=()))
    assert StoreWriter.create(store, spec).todo() == []
    assert seal_store(store).store_digest == StoreReader(original).digest
    assert files_of(store / "units") == units and repair_store(store).whole


def test_a_unit_that_was_made_good_since_it_was_looked_at_is_left(originals, store, monkeypatch):
    """Between the look and the moves another repair and a worker do all the work: nothing of theirs is taken out."""
    tokens, original, _ = originals
    flip(unit_file(store, 1), random.Random(0))
    (store / "manifest.json").unlink()
    real = _Repair.take_out

    def late(self):
        monkeypatch.setattr(_Repair, "take_out", real)
        assert repair_store(store).redo == (1,)
        spec = StoreReader(original).spec
        rows = tokens.tokens_rows(range(4, 8))
        StoreWriter.create(store, spec).commit_unit(1, [make_targets_row(row, spec) for row in rows])
        real(self)

    monkeypatch.setattr(_Repair, "take_out", late)
    report = repair_store(store)
    assert report.findings and report.redo == () and StoreWriter.create(store, StoreReader(original).spec).todo() == []
    assert seal_store(store).store_digest == StoreReader(original).digest


def stop_at(monkeypatch, number):
    """End a repair before the move of this number, which is the state after the one before it, as a kill would."""
    real, calls = paths.LocalFolder.move, []

    class Stopped(BaseException):
        pass

    def move(self, name, new_name):
        calls.append(name)
        if len(calls) == number + 1:
            raise Stopped
        return real(self, name, new_name)

    monkeypatch.setattr(paths.LocalFolder, "move", move)
    return Stopped


def test_a_kill_at_any_moment_is_finished_by_the_next_repair(originals, tmp_path, monkeypatch):
    tokens, original, _ = originals
    for number in range(20):
        store = tmp_path / str(number)
        shutil.copytree(original, store)
        flip(unit_file(store, 1), random.Random(number))
        swap(store, 2, 3)
        record_file(store, 4).write_bytes(b"")
        with monkeypatch.context() as patch:
            stopped = stop_at(patch, number)
            try:
                repair_store(store)
                break
            except stopped:
                pass
        if number:  # before the first move the store is sealed and damaged; after it no reader takes it for whole
            with pytest.raises((UnsealedError, CorruptError)):
                seal_store(store)
            with pytest.raises(UnsealedError):
                StoreReader(store)
        repair_store(store)
        assert make_again(store, tokens) == StoreReader(original).digest
    assert verify_store(store, deep=True).ok
    assert number >= 9  # manifest, index, files of three units and records of four


def test_repairs_at_once_beside_a_worker(originals, store):
    """Four repairs and a worker that makes what is missing, all at once: the end is the undamaged store."""
    tokens, original, _ = originals
    digest = StoreReader(original).digest
    for unit in (0, 2, 4):
        flip(unit_file(store, unit), random.Random(unit))
    (store / "manifest.json").unlink()
    errors = []

    def work():
        try:
            for _ in range(3):
                repair_store(store)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        writer = StoreWriter.create(store, StoreReader(original).spec)
        if writer.todo():
            with contextlib.suppress(CorruptError, UnsealedError):  # what the repairs have not come to yet
                make_again(store, tokens)
    for thread in threads:
        thread.join(30)
    assert errors == []
    repair_store(store)
    assert make_again(store, tokens) == digest and verify_store(store, deep=True).ok


def test_a_folder_for_the_index_beside_a_damaged_manifest_that_names_none(originals, store):
    tokens, original, foreign = originals
    for kind in ("flipped manifest", "folder for the index"):
        KINDS[kind](store, 2, foreign, random.Random(0))
    repair_store(store)
    assert make_again(store, tokens) == StoreReader(original).digest and verify_store(store, deep=True).ok


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_campaign_of_repairs(originals, tmp_path, capsys):
    """Every kind of damage to any unit, one to three of them at once, some of an unsealed store: 0 other digests."""
    tokens, original, foreign = originals
    counts = dict.fromkeys(("tried", "detected", "harmless", "silent", "hung", "crashed"), 0)
    digest = StoreReader(original).digest
    for number in range(200):
        rng = random.Random(number)
        store = tmp_path / str(number)
        shutil.copytree(original, store)
        chosen = rng.sample(sorted(KINDS), 1 + number % 3)
        if number % 4 == 3:
            (store / "manifest.json").unlink()
            chosen = [kind for kind in chosen if "manifest" not in kind and "index" not in kind]
        for kind, unit in zip(chosen, rng.sample(range(5), len(chosen)), strict=True):
            try:
                KINDS[kind](store, unit, foreign, rng)
            except (OSError, StopIteration):
                continue  # the damage before this one has taken the file
        counts["tried"] += 1
        try:
            report = repair_store(store)
            same = make_again(store, tokens) == digest and verify_store(store, deep=True).ok
        except Exception as error:
            counts["crashed"] += 1
            print(number, chosen, repr(error))
        else:
            counts["detected" if report.findings and same else "harmless" if same else "silent"] += 1
        shutil.rmtree(store)
    with capsys.disabled():
        tell("repairs of damaged stores", counts)
    assert counts["silent"] == counts["crashed"] == counts["hung"] == 0 and counts["detected"] > 150
