"""File systems without hard links, or whose listings lag: a kill at any write call is finished by the next start."""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest

from potstill.storage import (
    CorruptError,
    StoreError,
    StoreReader,
    StoreWriter,
    collect_garbage,
    discard_unused,
    seal_store,
    verify_store,
)
from potstill.storage.files import durable
from potstill.storage.files.checked_json import dump_checked, is_torn
from potstill.storage.files.commit import record_name
from potstill.storage.files.durable import publish_by_claim
from potstill.storage.files.paths import LocalFolder
from tests.campaign import tell
from tests.storage.stores import make_targets_row, targets_spec, write_targets, write_tokens

NUM_ROWS = 8  # two units
WRITE_CALLS = ("open", "write", "fsync", "rename", "link", "mkdir", "unlink", "rmdir")
IDS = tuple(i % 7 for i in range(1000))  # frequencies, so that the store has a table of ids as well


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("no_links") / "t", NUM_ROWS)


@pytest.fixture(scope="module")
def wanted(tokens, tmp_path_factory):
    """Digest of the store that an undisturbed writer leaves."""
    root = tmp_path_factory.mktemp("wanted")
    dump(tokens, root / "d")
    return StoreReader(root / "d").digest


def refuse_links():
    def link(*args, **kwargs):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    os.link = link


def kill_at(number):
    """SIGKILL to this process at its write call `number` (from 0); of a `write`, half of the bytes are written."""
    seen = -1

    def counted(name, real):
        def call(*args, **kwargs):
            nonlocal seen
            if name == "open" and not args[1] & os.O_WRONLY:
                return real(*args, **kwargs)
            seen += 1
            if seen == number:
                if name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in WRITE_CALLS:
        setattr(os, name, counted(name, getattr(os, name)))


def dump(tokens, path):
    """What a run of `dump` does with its store."""
    spec = targets_spec(tokens.num_rows, tokens.digest)
    writer = StoreWriter.create(path, spec, id_frequencies=IDS)
    for unit in writer.todo():
        writer.commit_unit(unit, [make_targets_row(row, spec) for row in tokens.tokens_rows(writer.unit_rows(unit))])
    seal_store(path)


def in_a_fork(work, *, seconds=60):
    """Exit code of a forked process that does `work`: 0, 1 after an error, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("a process without links hangs")


def run_without_links(tokens, path, *, killed_at=None):
    def work():
        refuse_links()
        if killed_at is not None:
            kill_at(killed_at)
        dump(tokens, path)

    return in_a_fork(work)


def is_whole(path, wanted):
    """Whether the store is the undisturbed one, and the sweep leaves nothing of the killed writers."""
    if StoreReader(path).digest != wanted or not verify_store(path, deep=True).ok:
        return False
    collect_garbage(path, dry_run=False)
    return not any(item.is_file() for item in (path / "tmp").rglob("*")) and verify_store(path, deep=True).ok


@pytest.mark.parametrize("killed_at", [1, 7, 10, 14, 19, 23, 40, 60, 75, 90, 100])
def test_a_kill_without_links_is_finished_by_the_next_start(tokens, wanted, tmp_path, killed_at):
    assert run_without_links(tokens, tmp_path / "d", killed_at=killed_at) == -signal.SIGKILL
    assert run_without_links(tokens, tmp_path / "d") == 0 and is_whole(tmp_path / "d", wanted)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_at_every_write_call_without_links(tokens, wanted, tmp_path, capsys):
    """One kill at each write call, then two and three one after the other at random ones."""
    counts = dict.fromkeys(("tried", "detected", "harmless", "silent", "hung", "crashed"), 0)
    rng = random.Random(0)
    single = []
    for number in range(1000):
        store = tmp_path / f"single{number}"
        if run_without_links(tokens, store, killed_at=number) == 0:
            break  # no so many write calls
        single.append([number])
        judge(counts, tokens, store, wanted, kills=1)
    several = [[rng.randrange(len(single)) for _ in range(rng.choice((2, 3)))] for _ in range(60)]
    for number, kills in enumerate(several):
        store = tmp_path / f"several{number}"
        hit = sum(run_without_links(tokens, store, killed_at=place) == -signal.SIGKILL for place in kills)
        judge(counts, tokens, store, wanted, kills=hit)
    with capsys.disabled():
        print(f"\n{len(single)} write calls, each met by a kill; {len(several)} stores with several kills")
        tell("kills without hard links", counts)
    assert counts["tried"] >= 100 and counts["harmless"] == counts["tried"]


def judge(counts, tokens, store, wanted, *, kills):
    """Count the kills of a store as harmless if the next start gives the undisturbed store."""
    counts["tried"] += kills
    try:
        code = run_without_links(tokens, store)
        outcome = "crashed" if code else ("harmless" if is_whole(store, wanted) else "silent")
    except StoreError:
        outcome = "detected"
    except AssertionError:
        outcome = "hung"
    counts[outcome] += kills


def race(tmp_path, publish, num_writers=4):
    """`publish(content, final)` by several processes at once, each with a content of its own; who said True, and it."""
    gate, final = tmp_path / "gate", tmp_path / "final.json"
    children = []
    for writer in range(num_writers):
        child = os.fork()
        if child == 0:
            code = 3
            try:
                while not gate.exists():
                    time.sleep(0)
                code = int(publish(content_of(writer), final))
            finally:
                os._exit(code)
        children.append(child)
    gate.touch()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    gate.unlink()
    assert set(codes) <= {0, 1}
    return [writer for writer, code in enumerate(codes) if code], final.read_bytes()


def content_of(writer):
    return dump_checked({"writer": writer, "filling": "x" * 5000})


@pytest.mark.parametrize("torn", [None, b"", content_of(9)[:-30]], ids=["free", "empty", "torn"])
def test_exactly_one_of_many_writers_wins_without_links(tmp_path, torn):
    winners = set()
    for turn in range(4):
        folder = tmp_path / str(turn)
        (folder / "tmp").mkdir(parents=True)
        if torn is not None:
            (folder / "final.json").write_bytes(torn)
        won, found = race(
            folder, lambda data, final: publish_by_claim(final, data, spare=final.parent / "tmp", is_torn=is_torn)
        )
        assert len(won) == 1 and found == content_of(won[0])
        winners |= set(won)
        assert not [item for item in (folder / "tmp").rglob("*") if item.is_file()]
    assert winners


def test_a_claim_that_comes_after_its_file_is_not_published(tmp_path, monkeypatch):
    """Between two looks of a writer the file is published, its claim swept, and a third writer has made a new claim."""
    final, claim, real = tmp_path / "final.json", tmp_path / f"{durable.CLAIM}final.json", durable._read

    def read(path, max_bytes):
        if path.parent == claim and not final.exists():
            final.write_bytes(content_of(0))
            claim.mkdir()
            path.write_bytes(content_of(1))
        return real(path, max_bytes)

    monkeypatch.setattr(durable, "_read", read)
    assert not publish_by_claim(final, content_of(2), spare=tmp_path)
    assert final.read_bytes() == content_of(0) and not claim.exists()


def test_force_does_away_with_the_claim_of_a_killed_run_too(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(LocalFolder, "_link", lambda self, tmp, final: None)
    first, other = (targets_spec(NUM_ROWS, tokens.digest, vocab_size=size) for size in (1000, 2000))
    claim = tmp_path / "d" / "tmp" / f"{durable.CLAIM}run.json"
    claim.mkdir(parents=True)
    (claim / "whole").write_bytes(dump_checked(first.to_json()))
    with pytest.raises(StoreError, match="vocab_size is 1000 in the store, 2000 is wanted now"):
        StoreWriter.create(tmp_path / "d", other)
    (tmp_path / "d" / "run.json").unlink()
    claim.mkdir()
    (claim / "whole").write_bytes(dump_checked(first.to_json()))
    assert StoreWriter.create(tmp_path / "d", other, force=True).spec == other


@pytest.mark.parametrize("content", ["empty", "half", "zeros", "without its end"])
def test_a_run_json_that_was_never_finished_is_replaced(tokens, wanted, tmp_path, content):
    dump(tokens, tmp_path / "whole")
    run = (tmp_path / "whole" / "run.json").read_bytes()
    torn = {"empty": b"", "half": run[: len(run) // 2], "zeros": bytes(len(run)), "without its end": run[:-1]}[content]
    spec = targets_spec(NUM_ROWS, tokens.digest)
    for folder in ("d", "resumed", "unused"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "run.json").write_bytes(torn)
    with pytest.raises(CorruptError, match=r"no checksum at the end of its .* run the command that writes it again"):
        StoreReader(tmp_path / "d")
    dump(tokens, tmp_path / "d")
    assert is_whole(tmp_path / "d", wanted)
    assert StoreWriter.resume(tmp_path / "resumed", spec) is None
    StoreWriter.create(tmp_path / "resumed", spec, force=True)
    discard_unused(tmp_path / "unused")
    assert not (tmp_path / "unused").exists()


def test_a_run_json_beside_units_is_never_replaced(tokens, tmp_path):
    """There the file was whole once: what it said of the units is not to be guessed."""
    dump(tokens, tmp_path / "d")
    run = (tmp_path / "d" / "run.json").read_bytes()
    (tmp_path / "d" / "run.json").write_bytes(run[:-10])
    for start in (lambda: dump(tokens, tmp_path / "d"), lambda: StoreWriter.resume(tmp_path / "d", None)):
        with pytest.raises(CorruptError, match=r"run\.json: no checksum at the end"):
            start()
    assert (tmp_path / "d" / "run.json").read_bytes() == run[:-10]


def test_a_manifest_that_was_never_finished_is_written_again(tokens, wanted, tmp_path):
    dump(tokens, tmp_path / "d")
    manifest = tmp_path / "d" / "manifest.json"
    whole = manifest.read_bytes()
    for torn in (b"", whole[:100], bytes(len(whole))):
        manifest.write_bytes(torn)
        with pytest.raises(CorruptError, match=r"manifest\.json: no checksum at the end"):
            StoreReader(tmp_path / "d")
        assert seal_store(tmp_path / "d").store_digest == wanted and manifest.read_bytes() == whole
    manifest.write_bytes(whole.replace(b'"num_rows":8', b'"num_rows":9'))
    with pytest.raises(CorruptError, match="does not fit"):
        seal_store(tmp_path / "d")  # damaged, not torn: nothing is done behind a person's back


def test_listings_that_lag(tokens, tmp_path, monkeypatch):
    """What the folder does not show yet is asked for by name: units of one's own, the first one, those of a seal."""
    spec = targets_spec(NUM_ROWS, tokens.digest)
    writer = StoreWriter.create(tmp_path / "d", spec)
    names = LocalFolder.names
    shown: set[str] = set()
    monkeypatch.setattr(
        LocalFolder,
        "names",
        lambda self, prefix, **cuts: [n for n in names(self, prefix) if prefix != "units" or n in shown],
    )
    for unit in (0, 1):
        writer.commit_unit(unit, [make_targets_row(row, spec) for row in tokens.tokens_rows(writer.unit_rows(unit))])
    assert writer.todo() == []
    other = StoreWriter.resume(tmp_path / "d", spec)
    assert other is not None and other.todo() == [0, 1]  # of others: done again at most
    assert not other.commit_unit(0, [make_targets_row(row, spec) for row in tokens.tokens_rows(range(4))])
    discard_unused(tmp_path / "d")
    assert seal_store(tmp_path / "d").num_rows == NUM_ROWS
    shown |= {record_name(unit) for unit in (0, 1)}
    assert verify_store(tmp_path / "d", deep=True).ok


def test_a_folder_that_cannot_be_renamed_is_an_error_that_says_so(tmp_path, monkeypatch):
    real = os.rename

    def rename(source, target):
        if Path(source).is_dir():
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(LocalFolder, "_link", lambda self, tmp, final: None)
    with pytest.raises(StoreError, match=r"run\.json failed: (EOPNOTSUPP|ENOTSUP).*nothing was committed"):
        StoreWriter.create(tmp_path / "d", targets_spec(NUM_ROWS, "in"))
    assert sorted(item.name for item in (tmp_path / "d").rglob("*")) == ["failures", "refused", "tmp", "units"]


def test_a_store_without_links_has_the_bytes_of_one_with(tokens, tmp_path, monkeypatch):
    write_targets(tmp_path / "with", tokens)
    monkeypatch.setattr(LocalFolder, "_link", lambda self, tmp, final: None)
    write_targets(tmp_path / "without", tokens)
    assert StoreReader(tmp_path / "with").digest == StoreReader(tmp_path / "without").digest
    assert sorted(p.name for p in (tmp_path / "without" / "tmp").rglob("*")) == []
