"""Four workers that are killed and restarted with other numbers leave the store that one undisturbed worker leaves."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from potstill.storage import StoreReader, store_status, verify_store
from potstill.teacher_dump import DumpConfig, dump
from potstill.teacher_dump.engines.hf import HfEngine
from tests.teacher_dump.tiny import make_tokens

DEADLINE_SECONDS = 120


def _config(tokens: Path, output: Path, model: Path) -> DumpConfig:
    teacher = {"model": model, "batch_rows": 2, "check_tokenizer": False}
    return DumpConfig(tokens=tokens, output=output, teacher=teacher, selection={"mode": "top_k", "k": 8})


def _in_a_batch(config: DumpConfig) -> Path:
    """The file that stands once a worker of `_start` is in its first batch."""
    return Path(config.output).with_suffix(".in_a_batch")


def _work(config: DumpConfig, worker: int, num_workers: int, pace_seconds: float) -> None:
    forward = HfEngine.forward

    def slow(self: HfEngine, batch: Any) -> Any:
        _in_a_batch(config).touch()
        time.sleep(pace_seconds)
        return forward(self, batch)

    HfEngine.forward = slow  # type: ignore[method-assign]  # in a process of its own
    dump(config, worker=worker, num_workers=num_workers)


def _start(config: DumpConfig, num_workers: int, pace_seconds: float) -> list[Any]:
    # Forked, so that four workers do not load the libraries four times.
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_work, args=(config, worker, num_workers, pace_seconds), daemon=True)
        for worker in range(num_workers)
    ]
    for process in workers:
        process.start()
    return workers


def _kill(workers: list[Any]) -> None:
    for process in workers:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    for process in workers:
        process.join(10)


def test_killed_workers_leave_every_row_once(tmp_path: Path, llama: Path) -> None:
    rng = random.Random(7)
    tokens = make_tokens(tmp_path / "tokens", [(16,), (9, 7), (3, 1, 12)] * 20, rows_per_unit=1)
    dump(_config(tokens, tmp_path / "alone", llama))
    config = _config(tokens, tmp_path / "many", llama)
    began, kills, rounds = time.monotonic(), 0, 0
    workers: list[Any] = []
    try:
        while not (tmp_path / "many" / "run.json").exists() or store_status(tmp_path / "many").missing:
            assert time.monotonic() - began < DEADLINE_SECONDS
            workers = _start(config, (4, 3, 2)[rounds % 3], pace_seconds=0.05)
            rounds += 1
            time.sleep(rng.uniform(0.3, 0.9))
            kills += sum(process.is_alive() for process in workers)
            _kill(workers)
    finally:
        _kill(workers)
    assert kills >= 4 and rounds >= 2
    assert dump(config).sealed
    assert StoreReader(tmp_path / "many").digest == StoreReader(tmp_path / "alone").digest


def test_sigterm_ends_a_worker_in_time_and_says_so(tmp_path: Path, llama: Path) -> None:
    tokens = make_tokens(tmp_path / "tokens", [(16,)] * 100, rows_per_unit=1)
    config = _config(tokens, tmp_path / "out", llama)
    workers = _start(config, 1, pace_seconds=0.05)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out" / "run.json").exists() or not store_status(tmp_path / "out").committed:
            assert time.monotonic() < deadline and workers[0].is_alive()
            time.sleep(0.05)
        os.kill(workers[0].pid, signal.SIGUSR1)
        workers[0].join(30)
        assert workers[0].exitcode == 1  # not 0: the share is not done
    finally:
        _kill(workers)
    assert 0 < store_status(tmp_path / "out").committed < 100


@pytest.mark.parametrize("output", ["data", "file"])
def test_a_place_that_holds_something_else_is_left_alone(
    tokens: Path, tmp_path: Path, llama: Path, output: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("more of it")
    with pytest.raises(ValueError, match=r"holds other files|not a folder|is a file"):
        dump(_config(tokens, tmp_path / output, llama))
    assert (tmp_path / "data" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "more of it"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_batch_that_takes_too_long_is_not_waited_for(tmp_path: Path, llama: Path, number: signal.Signals) -> None:
    tokens = make_tokens(tmp_path / "tokens", [(16,)] * 6, rows_per_unit=1)
    config = _config(tokens, tmp_path / "out", llama)
    dump(config, worker=0, num_workers=2)
    (worker,) = _start(config, 1, pace_seconds=120)
    try:
        deadline = time.monotonic() + 60
        while not _in_a_batch(config).exists():
            assert time.monotonic() < deadline and worker.is_alive()
            time.sleep(0.01)
        os.kill(worker.pid, number)
        worker.join(60)  # half of what the batch would take
        assert worker.exitcode == 75
    finally:
        _kill([worker])
    assert dump(config).units == 3  # type: ignore[union-attr]
    assert verify_store(tmp_path / "out", deep=True).ok
