"""One check before any rank starts: what it refuses, what it only notes, and that it writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from potstill.common.errors import UserError
from potstill.common.exit_codes import ERROR
from potstill.launch.cli import main
from potstill.student_train.run.checkpoint import ResumeError
from potstill.student_train.run.preflight import Machine, check_machine, check_run, check_start
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers


@pytest.fixture(scope="module")
def finished(stores, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint at step 2."""
    run = tmp_path_factory.mktemp("preflight") / "run"
    run_ranks(workers.train_run, tiny.config_tree(stores, run, run={"max_steps": 2}), world=1)
    return run


def test_more_ranks_than_cores_is_a_note_with_what_to_expect() -> None:
    (note,) = check_machine(Machine("cpu", 2), 16, planning=False)
    assert "--num-ranks 16 on 2 core(s): about 8 ranks share a core" in note and "--num-ranks 2" in note
    assert check_machine(Machine("cpu", 2), 2, planning=False) == ()


def test_more_ranks_than_gpus_is_refused_but_may_be_planned() -> None:
    with pytest.raises(UserError, match=r"--num-ranks 9, but this machine has 8 GPU\(s\).*take --num-ranks 8 or less"):
        check_machine(Machine("cuda", 8), 9, planning=False)
    (note,) = check_machine(Machine("cuda", 8), 64, planning=True)
    assert "this machine has 8 GPU(s)" in note
    assert check_machine(Machine("cuda", 8), 8, planning=False) == ()


def test_what_fits_gives_stores_plan_and_student(stores, tmp_path: Path) -> None:
    config = workers.config_of(tiny.config_tree(stores, tmp_path / "run", data={"global_batch_rows": 8}))
    checked = check_run(config, world_size=2)
    assert (checked.accumulation, checked.plan.total_steps, checked.student_config.hidden_size) == (2, 8, 32)
    start = check_start(config, num_ranks=2)
    assert start.checkpoint is None and start.run.stores.tokens.num_rows == 40
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("num_ranks", "changes", "words"),
    [
        (16, {"data": {"global_batch_rows": 8}}, "x 16 ranks = 32; set data.global_batch_rows to 32"),
        (2, {"data": {"tokens": "nowhere"}}, "data.tokens = nowhere does not exist"),
        (2, {"curriculum": [{"targets": "teacher", "temperature": 3.0}]}, "curriculum.0.temperature takes the value"),
        (2, {"curriculum": [{"until": 20}, {}]}, "curriculum.0.until = 20"),
        (2, {"model": {"config": {**tiny.STUDENT, "vocab_size": 47}}}, "vocab_size is 47"),
        (2, {"deepspeed": {"zero_optimization": {"reduce_bucket_sizes": 5}}}, "zero_optimization.reduce_bucket_sizes"),
        (2, {"checkpoint": {"resume": "nothing_there"}}, "checkpoint.resume = nothing_there"),
    ],
)
def test_every_mistake_is_one_error_of_the_command_and_no_rank_starts(
    stores, tmp_path: Path, capsys, monkeypatch, num_ranks: int, changes: dict[str, Any], words: str
) -> None:
    import yaml

    def started(*_: object, **__: object) -> None:
        raise AssertionError("a rank was started")

    monkeypatch.setattr("potstill.launch.train_command.run_ranks", started)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.config_tree(stores, tmp_path / "run", **changes)))
    for options in ([], ["--dry-run"]):
        assert main(["train", "--config", str(tmp_path / "run.yaml"), f"--num-ranks={num_ranks}", *options]) == ERROR
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("potstill train: error: ") == 1 and words in captured.err, captured.err
        assert captured.err.splitlines()[-1].count(words) == 1
        assert not (tmp_path / "run").exists()


def test_the_checkpoint_that_would_be_resumed_is_checked(stores, finished: Path) -> None:
    def start(**changes: Any) -> Any:
        tree = tiny.config_tree(stores, finished, **{"run": {"max_steps": 3}, **changes})
        return check_start(workers.config_of(tree), num_ranks=2)

    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*"))
    assert start().checkpoint.step == 2
    assert start(run={"max_steps": 3, "force": True}).checkpoint is None
    for changes, words in (
        ({"run": {"max_steps": 3, "seed": 9}}, r"(?s)run\.seed.*3.*9"),
        ({"run": {"max_steps": 1}}, "behind the end of the run"),
        ({"data": {"targets": {"teacher": str(stores["early_teacher"])}}}, "trained on other data.*teacher"),
    ):
        with pytest.raises(ResumeError, match=words):
            start(**changes)
    inside = finished / "checkpoints" / "step_00000002"
    with pytest.raises(UserError, match=r"which run\.force deletes"):
        start(run={"max_steps": 3, "force": True}, checkpoint={"resume": str(inside)})
    with pytest.raises(UserError, match=r"checkpoint\.resume is never.*--force"):
        start(checkpoint={"resume": "never"})
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*")) == before
