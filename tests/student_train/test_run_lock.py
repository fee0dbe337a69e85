"""One writer per run folder: who lives is refused, who is dead is taken over, and who was taken for dead ends."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from potstill.student_train.run import run_lock
from potstill.student_train.run.checkpoint import checkpoints_folder
from potstill.student_train.run.metrics import read_metrics
from potstill.student_train.run.run_folder import prepare_run_folder
from potstill.student_train.run.run_lock import LOCK_FILE, Holder, ProcessMark, RunHeldError, RunLock, refuse_running
from tests.dist_harness import Ranks, run_ranks
from tests.student_train import tiny, workers
from tests.student_train.test_resume import tree_of

ELSEWHERE = {"host": "another", "boot": "b", "processes": "pid:[1]"}


def lock_of(folder: Path, *marks: ProcessMark) -> RunLock:
    return RunLock(folder, marks or (ProcessMark.here(0),))


@pytest.fixture
def sleeper() -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    yield process
    process.kill()
    process.wait()


def mark_of(process: subprocess.Popen[bytes]) -> ProcessMark:
    start = run_lock._start_of(process.pid)
    assert start is not None
    return dataclasses.replace(ProcessMark.here(1), pid=process.pid, start=start)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine is watched for a second; a writer renews ten times in it."""
    monkeypatch.setattr(run_lock, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(run_lock, "TORN_SECONDS", 1.0)


def test_the_living_is_named_and_refused_at_once(tmp_path: Path, sleeper) -> None:
    """Any rank counts: one that is left when rank 0 was killed still writes."""
    gone = dataclasses.replace(ProcessMark.here(0), start="1")
    with lock_of(tmp_path, gone, mark_of(sleeper)).take():
        for ask in (lock_of(tmp_path).take, lambda: refuse_running(tmp_path)):
            begun = time.monotonic()
            with pytest.raises(RunHeldError) as error:
                ask()
            assert time.monotonic() - begun < 5
            for words in (f"rank 1, process {sleeper.pid} on ", str(tmp_path), "since 2", "run.output_dir"):
                assert words in str(error.value)
    assert not list(tmp_path.iterdir()), "nothing is left when it is given back"


@pytest.mark.parametrize("links", [True, False])
def test_the_dead_is_taken_over_at_once(tmp_path: Path, sleeper, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        monkeypatch.setattr(os, "link", refused_link)
    dead = lock_of(tmp_path, mark_of(sleeper))
    assert dead._create(Holder(dead.token, "then", dead.marks).to_bytes())
    sleeper.send_signal(signal.SIGKILL)
    while run_lock._start_of(sleeper.pid) is not None:  # also before anybody reaps it
        time.sleep(0.01)
    begun = time.monotonic()
    with lock_of(tmp_path).take() as lock:
        assert time.monotonic() - begun < 5
        lock.check()
        with pytest.raises(RunHeldError):
            lock_of(tmp_path).take()
    assert not list(tmp_path.iterdir())


def refused_link(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_a_later_process_of_the_same_id_is_another(tmp_path: Path) -> None:
    before = dataclasses.replace(ProcessMark.here(0), start="12")
    lock_of(tmp_path)._create(Holder("t", "then", (before,)).to_bytes())
    with lock_of(tmp_path).take():
        pass


def test_another_machine_is_believed_while_it_renews(tmp_path: Path, quick) -> None:
    far = lock_of(tmp_path, dataclasses.replace(ProcessMark.here(0), **ELSEWHERE)).take()
    with pytest.raises(RunHeldError, match="on another"):
        lock_of(tmp_path).take()
    far._ended.set()  # killed, or cut off: nothing renews the file any more
    far._renewer.join()
    with lock_of(tmp_path).take() as lock:
        lock.check()
        with pytest.raises(RunHeldError, match="taken for dead"):
            far.check()
        far.give_back()
        lock.check()  # the file of the other one is not touched


def test_a_file_that_is_no_lock_is_watched_and_taken(tmp_path: Path, quick, caplog) -> None:
    """Half of one: a kill between its creation and its content, where there are no hard links."""
    (tmp_path / LOCK_FILE).write_text('{"token": "ab')
    with lock_of(tmp_path).take():
        assert "watching for 1 s" in caplog.text
    assert not list(tmp_path.iterdir())


def take_and_hold(folder: str, begin: float, answers) -> None:
    while time.time() < begin:
        pass
    try:
        lock = lock_of(Path(folder)).take()
    except RunHeldError:
        answers.put(False)
        return
    time.sleep(0.5)  # for the others to try
    try:
        lock.check()
    except RunHeldError:
        answers.put(False)
        return
    answers.put(True)
    time.sleep(0.5)
    lock.give_back()


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_one_has_it(tmp_path: Path, stale: bool) -> None:
    context = multiprocessing.get_context("fork")
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        if stale:
            dead = dataclasses.replace(ProcessMark.here(0), start="1")
            lock_of(folder)._create(Holder("t", "then", (dead,)).to_bytes())
        answers = context.Queue()
        arguments = (str(folder), time.time() + 0.2, answers)
        takers = [context.Process(target=take_and_hold, args=arguments) for _ in range(6)]
        for taker in takers:
            taker.start()
        assert sorted(answers.get(timeout=30) for _ in takers) == [False] * 5 + [True]
        for taker in takers:
            taker.join(timeout=30)


def test_a_second_run_in_the_folder_ends_and_the_first_is_whole(stores, tmp_path: Path) -> None:
    """With another seed, and one rank more or less; --force deletes nothing of a run that is under way."""
    run = tmp_path / "run"
    tree = tree_of(stores, run, run={"max_steps": 4000}, checkpoint={"every_steps": 4, "keep_last": 3})
    with Ranks(workers.train_runs, world=2, args=([tree],)) as first:
        end = time.monotonic() + 60
        while not list(checkpoints_folder(run).glob("step_*/potstill.json")):
            assert time.monotonic() < end
            time.sleep(0.05)
        seed, force = ({**tree, "run": {**tree["run"], **change}} for change in ({"seed": 4}, {"force": True}))
        for answers in (*run_ranks(workers.train_runs, [seed, force], world=1),):
            assert len(answers) == 2
            for answer in answers:
                assert answer.startswith(f"RunHeldError: another run writes to {run}: rank 0, process "), answer
                assert str(first.processes[0].pid) in answer
        (run / "stop").touch()
        assert first.results(timeout_seconds=60)[0][0].startswith("stop")
    steps = [record["step"] for record in read_metrics(run) if record["kind"] == "train"]
    assert steps == sorted(set(steps)) and not (run / LOCK_FILE).exists()


def test_a_run_that_lost_its_folder_ends_before_it_saves(stores, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = tiny.config_tree(stores, run, run={"max_steps": 100_000}, checkpoint={"every_steps": 20})
    with Ranks(workers.train_runs, world=2, args=([tree],)) as ranks:
        end = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        other = Holder("another", "later", (dataclasses.replace(ProcessMark.here(0), **ELSEWHERE),))
        (run / LOCK_FILE).write_bytes(other.to_bytes())
        saved = set(checkpoints_folder(run).glob("step_*"))
        answers = ranks.results(timeout_seconds=60)
    for [answer] in answers:
        assert answer.startswith("RunHeldError: ") and "taken for dead" in answer and "on another" in answer, answer
    assert len(set(checkpoints_folder(run).glob("step_*")) - saved) <= 1  # one may have been under way
    assert json.loads((run / LOCK_FILE).read_text())["token"] == "another"


def test_renewing_costs_no_thread_after_the_end(tmp_path: Path) -> None:
    with lock_of(tmp_path).take():
        assert [thread for thread in threading.enumerate() if thread.name == "run lock"]
    assert not [thread for thread in threading.enumerate() if thread.name == "run lock"]


def test_a_folder_that_everybody_may_write_is_warned_of(stores, tmp_path: Path, caplog) -> None:
    run = tmp_path / "run"
    saved = checkpoints_folder(run) / "step_00000004"
    saved.mkdir(parents=True)
    (run / "config.yaml").write_text("run: {}")
    (saved / "a.pt").touch()
    config = workers.config_of(tiny.config_tree(stores, run))
    for path in (run, run / "config.yaml", saved.parent, saved, saved / "a.pt"):
        path.chmod(0o755)
    prepare_run_folder(config)
    assert "may be changed by every user" not in caplog.text
    (saved / "a.pt").chmod(0o666)
    prepare_run_folder(config)
    assert (
        f"run folder {run} may be changed by every user of this machine (checkpoints/step_00000004/a.pt)" in caplog.text
    )
