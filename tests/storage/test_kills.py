"""SIGKILL at random times, one and two writers, another world size at each start: every row exactly once."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from potstill.storage import StoreReader, collect_garbage, seal_store, store_status, verify_store
from tests.campaign import tell
from tests.storage.stores import same_targets, write_targets, write_tokens

ROOT = Path(__file__).parents[2]


def start_writer(tokens, store, worker, num_workers, offset):
    command = [sys.executable, "-m", "tests.storage.kill_worker", tokens.url, store, worker, num_workers, offset]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([str(c) for c in command], env=env, cwd=ROOT, stdout=subprocess.PIPE)


def campaign(tmp_path, *, num_rows, num_writers, kills_wanted, seed=0):
    """Kill until enough, then let the writers finish; returns the number of kills that hit a living writer."""
    tokens = write_tokens(tmp_path / "t", num_rows, rows_per_unit=2)
    reference = write_targets(tmp_path / "reference", tokens)
    rng = random.Random(seed)
    store, kills = tmp_path / "store", 0
    deadline = time.monotonic() + 30 + 4 * kills_wanted
    while kills < kills_wanted and time.monotonic() < deadline:
        same_share = rng.random() < 0.7
        world = 1 if same_share else num_writers
        writers = [start_writer(tokens, store, i % world, world, rng.randrange(1000)) for i in range(num_writers)]
        try:
            for writer in writers:
                writer.stdout.readline()
            time.sleep(rng.random() * 0.25)
            for writer in writers:
                if writer.poll() is None:
                    writer.kill()
                    kills += 1
                writer.wait(timeout=30)
                assert writer.returncode in (0, -9)
        finally:
            for writer in writers:
                writer.kill()
                writer.wait()
                writer.stdout.close()
        if is_sealed(store):
            break
    last = start_writer(tokens, store, 0, 1, 0)
    try:
        assert last.wait(timeout=120) == 0
    finally:
        last.kill()
        last.wait()
        last.stdout.close()
    manifest = seal_store(store)
    assert manifest.num_rows == num_rows and manifest.store_digest == reference.digest
    reader = StoreReader(store)
    for row in range(num_rows):
        assert same_targets(reader.row(row).targets, reference.row(row).targets)
    assert verify_store(store, deep=True).ok
    swept = collect_garbage(store, dry_run=False)
    assert verify_store(store, deep=True).ok
    return kills, len(swept.files)


def is_sealed(store):
    return (store / "run.json").exists() and store_status(store).sealed


@pytest.mark.parametrize("num_writers", [pytest.param(1, marks=pytest.mark.slow), 2])  # alone, it is the easier case
def test_a_few_kills(tmp_path, num_writers):
    # So many rows that a quick machine is not done before the second kill.
    kills, _ = campaign(tmp_path, num_rows=800, num_writers=num_writers, kills_wanted=3, seed=num_writers)
    assert kills >= 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_hundred_kills(tmp_path, capsys):
    total, swept, rounds = 0, 0, 0
    while total < 100:
        (tmp_path / str(rounds)).mkdir()
        num_writers = 1 + rounds % 2
        kills, files = campaign(
            tmp_path / str(rounds), num_rows=800, num_writers=num_writers, kills_wanted=25, seed=rounds
        )
        total, swept, rounds = total + kills, swept + files, rounds + 1
    with capsys.disabled():
        tell("SIGKILLs of writers", {"tried": total, "harmless": total}, leftovers_swept=swept)
        print(f"\n{total} SIGKILLs in {rounds} campaigns with 1 and 2 writers: every row once, {swept} leftovers swept")
