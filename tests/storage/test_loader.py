"""The loader: elastic and resumable order, joins, state, threads, bad rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from potstill.storage import (
    CorruptError,
    EpochPlan,
    Loader,
    MismatchError,
    StoreError,
    StoreReader,
    StoreWriter,
    seal_store,
)
from tests.storage.stores import make_scores_row, same_targets, targets_spec, write_targets, write_tokens

NUM_ROWS = 23


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root = tmp_path_factory.mktemp("loader")
    tokens = write_tokens(root / "t", NUM_ROWS, last_tokens=9)
    return tokens, write_targets(root / "d", tokens)


def make_loader(stores, *, rank=0, world=1, global_batch=6, mode="global", seed=1, **options):
    tokens, targets = stores
    plan = EpochPlan(NUM_ROWS, global_batch=global_batch, seed=seed, mode=mode, joined=("teacher",))
    return Loader(plan, tokens, {"teacher": targets}, rank=rank, world=world, **options)


def take_rows(loader, num_batches):
    out = []
    for _ in range(num_batches):
        batch = next(loader)
        assert [r.row for r in batch.tokens] == batch.rows.tolist()
        assert [r.row for r in batch.joined["teacher"]] == batch.rows.tolist()
        loader.commit(batch.batch)
        out.append(batch.rows)
    return np.concatenate(out)


@pytest.mark.parametrize("mode", ["global", "block", "sequential"])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 8, 9])
def test_ranks_share_each_global_batch_without_gap_or_overlap(stores, world, mode):
    """World sizes that do not divide the batch, and larger than it (ranks with no rows get an empty batch)."""
    plan = EpochPlan(NUM_ROWS, global_batch=6, seed=1, mode=mode)
    loaders = [make_loader(stores, rank=r, world=world, mode=mode, num_threads=1) for r in range(world)]
    try:
        for number in range(8):
            batches = [next(loader) for loader in loaders]
            np.testing.assert_array_equal(np.concatenate([b.rows for b in batches]), plan.rows(number))
            sizes = [len(b.rows) for b in batches]
            assert max(sizes) - min(sizes) <= 1
            assert all(len(b.tokens) == len(b.joined["teacher"]) == len(b.rows) for b in batches)
    finally:
        for loader in loaders:
            loader.close()


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_resume_at_every_step_with_another_world_equals_the_uninterrupted_stream(stores, world):
    plan = EpochPlan(NUM_ROWS, global_batch=6, seed=1)
    for step in range(6):
        with make_loader(stores) as first:
            for number in range(step):
                next(first)
                first.commit(number)
            state = json.loads(json.dumps(first.state_dict()))
        loaders = [make_loader(stores, rank=r, world=world, num_threads=1) for r in range(world)]
        for loader in loaders:
            loader.load_state_dict(state)
        for number in range(step, step + 2):
            batches = [next(loader) for loader in loaders]
            np.testing.assert_array_equal(np.concatenate([b.rows for b in batches]), plan.rows(number))
            for loader in loaders:
                loader.commit(number)
        assert len({json.dumps(loader.state_dict()) for loader in loaders}) == 1
        for loader in loaders:
            loader.close()


def test_chain_of_resumes_8_2_8_continues_exactly(stores):
    plan, state, number = EpochPlan(NUM_ROWS, global_batch=6, seed=1), None, 0
    for world in (8, 2, 8):
        loaders = [make_loader(stores, rank=r, world=world, num_threads=1) for r in range(world)]
        for loader in loaders:
            if state:
                loader.load_state_dict(state)
        for _ in range(3):
            rows = np.concatenate([next(loader).rows for loader in loaders])
            np.testing.assert_array_equal(rows, plan.rows(number))
            for loader in loaders:
                loader.commit(number)
            number += 1
        state = loaders[-1].state_dict()
        for loader in loaders:
            loader.close()
    assert state["position"] == {"epoch": 2, "stage": 0, "rows_consumed": 54}


def test_state_counts_committed_batches_whatever_was_prefetched(stores):
    states = []
    for prefetch in (1, 8):
        with make_loader(stores, prefetch_batches=prefetch, num_threads=3) as loader:
            for number in range(3):
                next(loader)
                if number < 2:
                    loader.commit(number)
            time.sleep(0.05)
            states.append(loader.state_dict())
    assert states[0] == states[1] and states[0]["batches"] == 2
    assert len(json.dumps(states[0])) < 1024
    # A crash before the third commit repeats the third batch exactly once.
    with make_loader(stores) as loader:
        loader.load_state_dict(states[0])
        assert next(loader).batch == 2


def test_a_range_of_batches_is_read_and_no_other(stores, monkeypatch):
    read = []
    honest = EpochPlan.rows
    monkeypatch.setattr(EpochPlan, "rows", lambda self, batch: (read.append(batch), honest(self, batch))[1])
    with make_loader(stores, first_batch=2, end_batch=5, prefetch_batches=4) as loader, make_loader(stores) as whole:
        found = [batch for batch in loader if loader.commit(batch.batch) is None]
        asked = sorted(read)
        assert [batch.batch for batch in found] == [2, 3, 4] == asked
        assert loader.state_dict()["batches"] == 5
        wanted = take_rows(whole, 5)[12:]
    np.testing.assert_array_equal(np.concatenate([batch.rows for batch in found]), wanted)
    with pytest.raises(StoreError, match=r"batches \[5, 4\) are no range"):
        make_loader(stores, first_batch=5, end_batch=4)


def test_state_of_other_stores_plans_or_versions_is_refused(stores, tmp_path):
    with make_loader(stores) as loader:
        state = loader.state_dict()
    tokens = write_tokens(tmp_path / "t", NUM_ROWS)
    other = (tokens, write_targets(tmp_path / "d", tokens))
    cases = [
        (make_loader(other), state, r"stores differs \(joined.teacher: saved"),
        (make_loader(stores, seed=2), state, "plan differs .*seed: saved 1, now 2"),
        (make_loader(stores, global_batch=5), state, "plan differs .*global_batch: saved 6, now 5"),
        (make_loader(stores), state | {"order_version": 2}, "order_version differs .saved 2, now 1"),
        (make_loader(stores), state | {"batches": -1}, "batches is -1"),
    ]
    for loader, saved, message in cases:
        with pytest.raises(MismatchError, match=message):
            loader.load_state_dict(saved)
    with make_loader(stores) as loader:
        next(loader)
        with pytest.raises(StoreError, match="before the first batch"):
            loader.load_state_dict(state)
        with pytest.raises(StoreError, match="batch 3 committed, expected 0"):
            loader.commit(3)


def test_peers_of_one_rank_get_identical_batches(stores):
    with make_loader(stores, rank=1, world=2) as a, make_loader(stores, rank=1, world=2, num_threads=4) as b:
        for _ in range(5):
            x, y = next(a), next(b)
            np.testing.assert_array_equal(x.rows, y.rows)
            for left, right in zip(x.joined["teacher"], y.joined["teacher"], strict=True):
                assert same_targets(left.targets, right.targets)


def test_joined_stores_must_fit_the_tokens(stores, tmp_path):
    tokens, targets = stores
    plan = EpochPlan(NUM_ROWS, global_batch=6, seed=1)
    longer = write_tokens(tmp_path / "t", NUM_ROWS, vocab_size=1000)
    with pytest.raises(MismatchError, match="input_digest"):
        Loader(plan, longer, {"teacher": targets})
    wrong_tokenizer = write_targets(tmp_path / "d", tokens, tokenizer_digest="same size, other tokenizer")
    with pytest.raises(MismatchError, match="tokenizer_digest"):
        Loader(plan, tokens, {"teacher": wrong_tokenizer})
    with pytest.raises(MismatchError, match="expected tokens"):
        Loader(plan, targets, {})
    with (
        Loader(EpochPlan(NUM_ROWS, global_batch=6, seed=1, joined=("x",)), tokens, {}) as loader,
        pytest.raises(StoreError, match=r"needs the stores \['x'\]"),
    ):
        next(loader)


def test_two_teachers_and_scores_are_joined_by_row(stores, tmp_path):
    tokens, teacher = stores
    late = write_targets(tmp_path / "late", tokens, seed=5)
    spec = targets_spec(NUM_ROWS, tokens.digest, kind="scores", selection=None, teacher=None)
    writer = StoreWriter.create(tmp_path / "s", spec)
    for unit in writer.todo():
        writer.commit_unit(unit, [make_scores_row(tokens.row(r), spec) for r in writer.unit_rows(unit)])
    seal_store(tmp_path / "s")
    joined = {"early": teacher, "late": late, "slm": StoreReader(tmp_path / "s")}
    plan = EpochPlan(NUM_ROWS, global_batch=6, seed=1, joined=("early", "late", "slm"))
    with Loader(plan, tokens, joined) as loader:
        for _ in range(4):
            batch = next(loader)
            for place, row in enumerate(batch.rows.tolist()):
                assert same_targets(batch.joined["early"][place].targets, teacher.row(row).targets)
                assert same_targets(batch.joined["late"][place].targets, late.row(row).targets)
                assert batch.joined["slm"][place].stats == {"mean_loss": float(np.float32(row / 3))}
            loader.commit(batch.batch)
        assert len(json.dumps(loader.state_dict())) < 1024


def test_rows_made_from_other_tokens_are_refused(stores, monkeypatch):
    import potstill.storage.rows.row_types as module

    monkeypatch.setattr(module, "token_digest", lambda tokens, doc_lens: 1)
    with make_loader(stores) as loader, pytest.raises(MismatchError, match="was made from other tokens"):
        next(loader)


def test_targets_of_batches_that_do_not_need_them_are_not_read(stores, monkeypatch):
    tokens, targets = stores
    read = []
    monkeypatch.setattr(targets, "rows", lambda ids: read.extend(ids) or type(targets).rows(targets, ids))

    class EveryOther(EpochPlan):
        def joined(self, batch):
            return frozenset({"teacher"}) if batch % 2 else frozenset()

    plan = EveryOther(NUM_ROWS, global_batch=6, seed=1)
    with Loader(plan, tokens, {"teacher": targets}, prefetch_batches=1, num_threads=1) as loader:
        batches = [next(loader) for _ in range(4)]
    assert [sorted(b.joined) for b in batches] == [[], ["teacher"], [], ["teacher"]]
    assert read == [*plan.rows(1), *plan.rows(3)]


def damage(store: Path, row: int) -> None:
    reader = StoreReader(store)
    entry = reader._locate(row)
    file = store / "units" / reader.manifest.units[int(entry["unit"])].file
    data = bytearray(file.read_bytes())
    data[int(entry["offset"]) + int(entry["length"]) // 2] ^= 1
    file.write_bytes(data)


def test_bad_row_raises_in_the_consumer(tmp_path):
    tokens = write_tokens(tmp_path / "t", NUM_ROWS, rows_per_unit=1)
    good = write_targets(tmp_path / "d", tokens, rows_per_unit=1)
    plan = EpochPlan(NUM_ROWS, global_batch=6, seed=1, joined=("teacher",))
    # One row in each half of the third batch, so in the reads of two threads.
    early, late = (int(plan.rows(2)[place]) for place in (1, 4))
    damage(tmp_path / "d", early)
    damage(tmp_path / "d", late)
    for finish in ({}, {"finish": lambda batch: batch}):
        with Loader(plan, tokens, {"teacher": good}, **finish) as loader:
            assert [next(loader).batch for _ in range(2)] == [0, 1], "not before the turn of its batch"
            with pytest.raises(CorruptError, match=f"row {early}: record batch"):
                next(loader)
            with pytest.raises(StoreError, match="closed"):
                next(loader)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_batches_are_finished_by_the_threads_and_come_in_order(stores, num_threads):
    """The first batches are held back until a later one is finished: still each comes in its turn."""
    threads, third_is_done = set(), threading.Event()

    def finish(batch):
        threads.add(threading.current_thread().name)
        if num_threads > 1 and batch.batch == 0:
            assert third_is_done.wait(20)
        if batch.batch == 2:
            third_is_done.set()
        return batch.batch, [row.row for row in batch.tokens], len(batch.joined["teacher"])

    plan = EpochPlan(NUM_ROWS, global_batch=6, seed=1)
    with make_loader(stores, finish=finish, num_threads=num_threads) as loader:
        for number in range(5):
            assert next(loader) == (number, plan.rows(number).tolist(), 6)
            loader.commit(number)
        assert loader.state_dict()["batches"] == 5
    assert threads and all(name.startswith("potstill-loader") for name in threads)
    # A rank without rows has finished batches as well.
    with make_loader(stores, rank=0, world=7, finish=lambda batch: (batch.batch, len(batch.rows))) as loader:
        assert [next(loader) for _ in range(3)] == [(0, 0), (1, 0), (2, 0)]


def test_what_finishing_raises_is_raised_in_the_turn_of_its_batch(stores):
    def finish(batch):
        if batch.batch == 2:
            raise ArithmeticError("batch 2 cannot be finished")
        return batch.batch

    with make_loader(stores, finish=finish, num_threads=3) as loader:
        assert [next(loader), next(loader)] == [0, 1]
        with pytest.raises(ArithmeticError, match="batch 2 cannot"):
            next(loader)
        with pytest.raises(StoreError, match="closed"):
            next(loader)


def test_queue_is_bounded_while_the_consumer_stalls(stores, monkeypatch):
    """All that may be read ahead is read without another call of the consumer, and nothing beyond it."""
    loader = make_loader(stores, prefetch_batches=3, num_threads=2)
    started, all_allowed = [], threading.Event()
    load = loader._load

    def counting_load(rows, names):
        started.append(len(rows))
        if sum(started) == (1 + 3) * 6:
            all_allowed.set()
        return load(rows, names)

    monkeypatch.setattr(loader, "_load", counting_load)
    with loader:
        next(loader)
        assert all_allowed.wait(20)
        # What a thread could still begin lies in the queue by now: work is handed out by the consumer's calls alone.
        assert loader._prefetcher._queue.empty()
    assert sum(started) == (1 + 3) * 6


def test_close_joins_threads_even_while_a_read_blocks(stores, monkeypatch):
    release, reading = threading.Event(), threading.Event()
    loader = make_loader(stores, prefetch_batches=4)

    def blocked_load(rows, names):
        reading.set()
        assert release.wait(20)
        raise AssertionError("nobody asks for this read")

    monkeypatch.setattr(loader, "_load", blocked_load)
    seen = []

    def consume():
        with pytest.raises(StoreError, match="closed while this batch was awaited"):
            next(loader)
        seen.append(True)

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    assert reading.wait(20)
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 1.5
    consumer.join(20)
    assert seen
    release.set()
    with make_loader(stores) as healthy:
        next(healthy)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("potstill-loader")]
    for thread in threads:
        thread.join(20)
    assert not [thread.name for thread in threads if thread.is_alive()]


def test_slow_reads_run_side_by_side_and_ahead_of_the_consumer(stores, monkeypatch):
    """What hides slow storage: while the consumer holds a batch, all those ahead of it are being read at once."""
    tokens, _ = stores
    rows = type(tokens).rows
    depth = 4
    together = threading.Barrier(depth)  # a read comes back only when all of them have begun

    def slow_rows(self, ids):
        together.wait(timeout=20)
        return rows(self, ids)

    monkeypatch.setattr(type(tokens), "rows", slow_rows)
    plan = EpochPlan(NUM_ROWS, global_batch=2, seed=1)
    with Loader(plan, tokens, {}, prefetch_batches=depth, num_threads=depth) as loader:
        got = [next(loader).batch for _ in range(depth)]
        assert got == list(range(depth))
        together.abort()


CHILD = """
import sys, threading, time
from potstill.storage import EpochPlan, Loader, StoreReader
import potstill.storage.files.paths as paths
tokens = StoreReader(sys.argv[1])
paths.LocalFolder.read_range = lambda self, *a: time.sleep(60)
loader = Loader(EpochPlan(tokens.num_rows, global_batch=4, seed=0), tokens, {})
print("ready", flush=True)
next(loader)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_during_a_blocked_read_ends_the_process(stores, signum):
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, stores[0].url], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.3)
        process.send_signal(signum)
        assert process.wait(timeout=3) != 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_many_readers_and_loaders_share_one_read_only_store(stores):
    targets = stores[1]
    wanted = {row: targets.row(row).targets for row in range(NUM_ROWS)}
    errors = []

    def read(seed):
        try:
            reader = StoreReader(targets.url) if seed % 2 else targets
            for row in np.random.default_rng(seed).permutation(NUM_ROWS):
                assert same_targets(reader.row(int(row)).targets, wanted[int(row)])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    loaders = [make_loader(stores, seed=seed) for seed in range(4)]
    for loader in loaders:
        with loader:
            assert len(take_rows(loader, 3)) == 18
    for thread in threads:
        thread.join()
    assert not errors
