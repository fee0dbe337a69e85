"""Kill and resume: the same losses at the same world size, the same batches at another, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from potstill.student_train.run.checkpoint import MANIFEST, checkpoints_folder, list_checkpoints, remove_checkpoint
from potstill.student_train.run.metrics import read_metrics
from tests.dist_harness import Ranks, run_ranks
from tests.student_train import tiny, workers

STEPS = 24


def tree_of(stores: dict[str, Path], output: Path, *, stage: int = 1, **changes: Any) -> dict[str, Any]:
    """A run of two stages with a row selector early, saved each 4 steps."""
    curriculum = [
        {
            "until": 0.5,
            "targets": "teacher",
            "rows": {"score": {"of": [{"store": "slm"}]}, "share": {"kind": "linear", "start": 0.5, "end": 1}},
        },
        {"targets": None},
    ]
    changes = {"zero_stage": stage, "checkpoint": {"every_steps": 4}, "run": {"max_steps": STEPS}, **changes}
    return tiny.config_tree(stores, output, curriculum=curriculum, **changes)


def steps_of(run: Path) -> tuple[list[float], list[str]]:
    """Loss and row digest of each step of a run, in order."""
    records = [record for record in read_metrics(run) if record["kind"] == "train"]
    return (
        [loss for record in records for loss in record["step_losses"]],
        [digest for record in records for digest in record["row_digests"]],
    )


def cut_back(run: Path, to: Path, step: int) -> Path:
    """A copy of a run as it was left right behind the checkpoint of `step`."""
    shutil.copytree(run, to)
    for checkpoint in list_checkpoints(to):
        if checkpoint.step > step:
            remove_checkpoint(checkpoint.folder)
    return to


def kill_after(tree: dict[str, Any], run: Path, *, step: int, world: int) -> int:
    """Start the run on `world` ranks, SIGKILL all of them once `step` steps are logged; returns the newest save."""
    with Ranks(workers.train_run, world=world, args=(tree,)) as ranks:
        end = time.monotonic() + 60
        while not any(record["step"] >= step for record in read_metrics(run)):
            assert time.monotonic() < end, "the run did not come as far"
            time.sleep(0.01)
        ranks.kill()
    saved = list_checkpoints(run)[-1].step
    assert saved < STEPS, "the run was over before it was killed"
    return saved


@pytest.mark.parametrize("stage", [0, 1])
def test_killed_two_rank_run_resumes_on_two_and_on_one(stores, tmp_path: Path, stage: int) -> None:
    whole, killed, alone = (tmp_path / name for name in ("whole", "killed", "alone"))
    run_ranks(workers.train_run, tree_of(stores, whole, stage=stage), world=2)
    expected_losses, expected_rows = steps_of(whole)
    assert len(expected_losses) == STEPS

    tree = tree_of(stores, killed, stage=stage)
    saved = kill_after(tree, killed, step=9, world=2)
    shutil.copytree(killed, alone)

    assert run_ranks(workers.train_run, tree, world=2)[0]["status"] == "done"
    assert steps_of(killed) == (expected_losses, expected_rows)

    run_ranks(workers.train_run, tree_of(stores, alone, stage=stage), world=1)
    losses, rows = steps_of(alone)
    assert rows == expected_rows
    assert losses[:saved] == expected_losses[:saved]
    # Other summation order of float32 gradients; a wrong optimizer state or batch would show in the second digit.
    assert losses[saved:] == pytest.approx(expected_losses[saved:], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_world_size_two_one_two(stores, tmp_path: Path, stage: int, dtype: str) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    options = {"stage": stage, "model": {"dtype": dtype}}
    run_ranks(workers.train_run, tree_of(stores, whole, **options), world=2)
    kill_after(tree_of(stores, moved, **options), moved, step=5, world=2)
    kill_after(tree_of(stores, moved, **options), moved, step=13, world=1)
    run_ranks(workers.train_run, tree_of(stores, moved, **options), world=2)
    losses, rows = steps_of(moved)
    expected, expected_rows = steps_of(whole)
    assert rows == expected_rows
    assert losses == pytest.approx(expected, rel=1e-5 if dtype == "float32" else 5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_bit_equal_after_a_kill(stores, tmp_path: Path, stage: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = {"stage": stage, "model": {"dtype": "bfloat16"}}
    run_ranks(workers.train_run, tree_of(stores, whole, **options), world=2)
    kill_after(tree_of(stores, killed, **options), killed, step=9, world=2)
    run_ranks(workers.train_run, tree_of(stores, killed, **options), world=2)
    assert steps_of(killed) == steps_of(whole)


def test_unfinished_and_damaged_checkpoints_are_passed_over(stores, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = tree_of(stores, run, run={"max_steps": 12}, checkpoint={"every_steps": 4, "keep_last": 3})
    run_ranks(workers.train_run, tree, world=1)
    expected = steps_of(run)
    oldest, middle, newest = list_checkpoints(run)
    assert [c.step for c in (oldest, middle, newest)] == [4, 8, 12]
    (newest.folder / MANIFEST).unlink()
    name = next(iter(middle.manifest["files"]))
    (middle.folder / name).write_bytes((middle.folder / name).read_bytes()[:-1])
    assert [c.step for c in list_checkpoints(run)] == [4]
    run_ranks(workers.train_run, tree, world=1)
    assert steps_of(run) == expected


def test_retention_keeps_the_last_and_the_permanent_ones(stores, tmp_path: Path) -> None:
    run = tmp_path / "run"
    keep = {"every_steps": 2, "keep_last": 1, "permanent_every_steps": 6}
    run_ranks(workers.train_run, tree_of(stores, run, run={"max_steps": 9}, checkpoint=keep), world=1)
    assert [c.step for c in list_checkpoints(run)] == [6, 9]
    names = sorted(path.name for path in checkpoints_folder(run).iterdir() if path.is_dir())
    assert names == ["step_00000006", "step_00000009"]


def test_a_checkpoint_refuses_other_stores_and_other_settings(stores, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks(workers.train_run, tree_of(stores, run, run={"max_steps": 4}), world=1)
    other = tiny.write_all(tmp_path / "other", num_rows=40, last_length=21)
    for tree, words in (
        (tree_of(other, run, run={"max_steps": 8}), ("trained on other data", "stores")),
        (tree_of(stores, run, run={"max_steps": 4, "seed": 4}), ("run.seed", "3", "4")),
        (tree_of(stores, run, run={"max_steps": 4}, data={"order": "block"}), ("data.order", "block")),
        (tree_of(stores, run, run={"max_steps": 3}), ("behind the end of the run", "max_steps")),
    ):
        with pytest.raises(AssertionError) as error:
            run_ranks(workers.train_run, tree, world=1)
        assert all(word in str(error.value) for word in words), str(error.value)
    assert [c.step for c in list_checkpoints(run)] == [4]


def test_a_longer_run_goes_on_with_a_schedule_over_stages(stores, tmp_path: Path) -> None:
    """The stages that are done keep their learning rates; the last one is laid over the new end."""
    run = tmp_path / "run"
    options = {
        "curriculum": [{"until": 4, "targets": "teacher"}, {}],
        "schedule": {"kind": "linear", "span": "stages", "warmup": 0, "min_ratio": 0.0},
        "logging": {"every_steps": 1},
    }
    for steps in (8, 12):
        tree = tiny.config_tree(stores, run, run={"max_steps": steps}, **options)
        assert run_ranks(workers.train_run, tree, world=1)[0]["steps"] == steps
    found = [record["lr"] / 3e-3 for record in read_metrics(run) if record["kind"] == "train"]
    first, short, long = ([1 - step / length for step in range(length)] for length in (4, 4, 8))
    assert found == pytest.approx([*first, *short, *long[4:]])


def test_resume_from_a_path_and_never(stores, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = tree_of(stores, run, run={"max_steps": 8}, checkpoint={"every_steps": 4, "keep_last": 9})
    run_ranks(workers.train_run, tree, world=1)
    expected = steps_of(run)
    from_path = {"every_steps": 4, "keep_last": 9, "resume": str(checkpoints_folder(run) / "step_00000004")}
    run_ranks(workers.train_run, {**tree, "checkpoint": from_path}, world=1)
    assert steps_of(run) == expected
    missing = {"resume": str(tmp_path / "nowhere")}
    with pytest.raises(AssertionError, match="nowhere does not exist"):
        run_ranks(workers.train_run, {**tree, "checkpoint": missing}, world=1)
    with pytest.raises(AssertionError, match=r"run\.force"):
        run_ranks(workers.train_run, {**tree, "checkpoint": {"resume": "never"}}, world=1)
    assert json.loads((run / "done.json").read_text())["step"] == 8
