"""A disk that is full in the middle of a run: one clear error on every rank, and nothing lost but the last steps."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.common.exit_codes import ERROR
from potstill.student_train.run.checkpoint import checkpoints_folder, list_checkpoints
from potstill.student_train.run.metrics import METRICS_FILE
from tests.dist_harness import Ranks, run_ranks
from tests.student_train import tiny, workers
from tests.student_train.test_resume import STEPS, steps_of, tree_of
from tests.student_train.test_runs import start


@pytest.fixture(scope="module")
def whole(stores, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run on so many ranks, undisturbed; each is trained once."""
    found: dict[int, Path] = {}

    def on(world: int) -> Path:
        if world not in found:
            found[world] = tmp_path_factory.mktemp("whole") / "run"
            run_ranks(workers.train_run, tree_of(stores, found[world]), world=world)
        return found[world]

    return on


def command(tree: dict[str, Any], folder: Path) -> tuple[int, str]:
    """Exit code and standard error of the run as a command."""
    process = start(tree, folder)
    try:
        _, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, errors


@pytest.mark.timeout(300)  # starts a command on a busy machine
def test_a_disk_full_in_the_middle_of_a_save(stores, whole, tmp_path: Path, small_disk) -> None:
    one = sum(said["bytes"] for said in list_checkpoints(whole(1))[-1].manifest["files"].values())
    # keep_last is 2: there is room for two checkpoints and all small files, but not for a third.
    disk = small_disk(int(2.7 * one) // 1024)
    run = disk / "run"
    tree = tree_of(stores, run)
    code, errors = command(tree, tmp_path)
    assert code == ERROR and "Traceback" not in errors, errors
    last = errors.strip().splitlines()[-1]
    for words in ("step 12", str(checkpoints_folder(run) / "step_00000012"), "No space left on device", "make room"):
        assert words in last, last
    assert f"the checkpoint that stands is {checkpoints_folder(run) / 'step_00000008'}" in last
    assert [checkpoint.step for checkpoint in list_checkpoints(run)] == [4, 8]
    assert not (checkpoints_folder(run) / "step_00000012").exists(), "half a checkpoint keeps the disk full"
    assert not (run / "done.json").exists()

    small_disk(16384)
    run_ranks(workers.train_run, tree, world=1)
    assert steps_of(run) == steps_of(whole(1))


def answers(tree: dict[str, Any], *, step: int, rank: int, num_bytes: int) -> list[str]:
    """What each of two ranks says when one may write no file above so many bytes from `step` on."""
    arguments = (tree, step, rank, num_bytes)
    with Ranks(workers.train_with_a_limit_on_files, world=2, args=arguments) as ranks:
        return [str(answer) for answer in ranks.results(timeout_seconds=60)]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_one_of_two_ranks_cannot_write_its_part(stores, whole, tmp_path: Path, rank: int) -> None:
    run = tmp_path / "run"
    tree = tree_of(stores, run, stage=1)
    told = answers(tree, step=8, rank=rank, num_bytes=20_000)
    stands = checkpoints_folder(run) / "step_00000004"
    for text in told:
        assert text.startswith("CheckpointWriteError: step 8: ") and str(run) in text, text
        assert f"rank {rank}: " in text and f"rank {1 - rank}: " not in text, text
        assert "File too large (torch: " in text and f"stands is {stands}" in text, text
    assert [checkpoint.step for checkpoint in list_checkpoints(run)] == [4]
    assert not (checkpoints_folder(run) / "step_00000008").exists()
    run_ranks(workers.train_run, tree, world=2)
    assert steps_of(run) == steps_of(whole(2))


def test_metrics_that_cannot_be_written_stop_all_ranks(stores, whole, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = tree_of(stores, run)
    told = answers(tree, step=9, rank=0, num_bytes=1_000)
    stands = checkpoints_folder(run) / "step_00000008"
    for text in told:
        # Lines are due every second step: the first after step 9 is that of step 10.
        assert text.startswith("MetricsWriteError: step 10: ") and str(run) in text, text
        assert f"Last checkpoint: {stands}" in text and "make room" in text, text
    assert "File too large" in told[0] and "rank 0" in told[1]
    run_ranks(workers.train_run, tree, world=2)
    assert steps_of(run) == steps_of(whole(2))


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_disk_that_takes_half_a_line_of_metrics(stores, whole, tmp_path: Path, small_disk, tensorboard) -> None:
    disk = small_disk(4096)
    run = disk / "run"
    tree = tree_of(stores, run, checkpoint={"every_steps": None}, logging={"tensorboard": tensorboard})
    result = run_ranks(workers.train_with_a_disk_full, tree, 3, str(disk / "other"), world=1)[0]
    assert result.startswith("MetricsWriteError: step ") and "No space left on device" in result
    assert "Last checkpoint: none" in result
    half = (run / METRICS_FILE).read_bytes()
    # TensorBoard's file, which holds more, is the first that the disk does not take.
    assert half and half.endswith(b"\n") == tensorboard, "the disk took a part of the line"
    (disk / "other").unlink()
    run_ranks(workers.train_run, tree, world=1)
    assert steps_of(run) == steps_of(whole(1))
    lines = (run / METRICS_FILE).read_text().splitlines()
    assert all(json.loads(line) for line in lines)
    assert json.loads((run / "done.json").read_text())["step"] == STEPS


def test_a_stop_right_behind_a_save_leaves_the_checkpoint_alone(stores, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = tiny.config_tree(stores, run, run={"max_steps": 4})
    run_ranks(workers.train_run, tree, world=1)
    [saved] = list_checkpoints(run)
    before = {path: path.stat().st_mtime_ns for path in saved.folder.iterdir()}
    stopped = tiny.config_tree(stores, run, run={"max_steps": 8, "max_runtime_minutes": 1e-6})
    assert run_ranks(workers.train_run, stopped, world=1)[0]["steps"] == 4
    assert {path: path.stat().st_mtime_ns for path in saved.folder.iterdir()} == before
