"""A stage with restart_optimizer trains as with an optimizer just made, under each ZeRO stage and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from potstill.common.errors import ConfigError
from potstill.student_train.run.dry_run import dry_run
from potstill.student_train.run.dry_run_text import format_dry_run
from potstill.student_train.run.preflight import check_start
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.student_train.test_resume import cut_back, steps_of

BOUNDARY, STEPS = 3, 6


def tree_of(stores: dict[str, Path], output: Path, *, restarts: bool = True, **changes: Any) -> dict[str, Any]:
    """Two stages that differ in nothing but the optimizer's restart; saved at the bound between them."""
    stages = [{"until": BOUNDARY, "targets": "teacher"}, {"targets": "teacher", "restart_optimizer": restarts}]
    fixed = {
        "run": {"max_steps": STEPS},
        "schedule": {"kind": "constant", "warmup": 0},
        "checkpoint": {"every_steps": BOUNDARY},
        "logging": {"every_steps": 1},
        "data": {"heldout": None, "heldout_targets": None},
    }
    return tiny.config_tree(stores, output, curriculum=stages, **{**fixed, **changes})


def changes_of(kind: str, zero: int) -> dict[str, Any]:
    return {"optimizer": {"lr": 3e-3, "kind": kind}, "zero_stage": zero}


@pytest.fixture(scope="module")
def set_back(stores, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with Muon and AdamW beside it that restarts its optimizer at the bound."""
    run = tmp_path_factory.mktemp("restart") / "set_back"
    run_ranks(workers.train_run, tree_of(stores, run, **changes_of("muon", 0)), world=1)
    return run


@pytest.mark.parametrize(("kind", "zero"), [("muon", 0), ("adamw", 3)])
def test_it_takes_the_steps_of_an_optimizer_just_made(
    stores, set_back: Path, tmp_path: Path, kind: str, zero: int
) -> None:
    run = set_back
    if kind != "muon":
        run = tmp_path / "set_back"
        run_ranks(workers.train_run, tree_of(stores, run, **changes_of(kind, zero)), world=1)
    run_ranks(workers.train_with_new_state, tree_of(stores, tmp_path / "new", **changes_of(kind, zero)), world=1)
    assert steps_of(run) == steps_of(tmp_path / "new")


@pytest.mark.parametrize("restarts", [True, False])
def test_it_is_exact_on_resume_at_the_bound_and_changes_what_follows_alone(
    stores, set_back: Path, tmp_path: Path, restarts: bool
) -> None:
    run = cut_back(set_back, tmp_path / "resumed", BOUNDARY)
    run_ranks(workers.train_run, tree_of(stores, run, restarts=restarts, **changes_of("muon", 0)), world=1)
    (losses, rows), (found, found_rows) = steps_of(set_back), steps_of(run)
    assert found_rows == rows
    if restarts:
        assert found == losses
    else:  # the loss of the first step after the bound is that of the weights before it
        assert found[: BOUNDARY + 1] == losses[: BOUNDARY + 1] and found[BOUNDARY + 1] != losses[BOUNDARY + 1]


def test_a_dry_run_says_where(stores, tmp_path: Path) -> None:
    start = check_start(workers.config_of(tree_of(stores, tmp_path / "run")), num_ranks=1)
    lines = format_dry_run(dry_run(start)).splitlines()
    assert [line.strip() for line in lines if "starts anew" in line] == [
        "stage_1: steps 3 to 5, the optimizer starts anew"
    ]


def test_moments_on_a_disk_are_refused(stores, tmp_path: Path) -> None:
    offload = {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}
    with pytest.raises(ConfigError, match="restart_optimizer of a stage does not reach moments on a disk"):
        workers.config_of(tree_of(stores, tmp_path / "run", zero_stage=3, deepspeed=offload))
