"""A stage with restart_optimizer goes on as with an optimizer just made, under each ZeRO stage and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from potstill.common.errors import ConfigError
from potstill.student_train.run.checkpoint import checkpoint_folder
from potstill.student_train.run.dry_run import dry_run
from potstill.student_train.run.dry_run_text import format_dry_run
from potstill.student_train.run.preflight import check_start
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.student_train.test_resume import steps_of

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


@pytest.mark.parametrize(("kind", "zero"), [("muon", 0), ("adamw", 3)])
def test_it_takes_the_steps_of_an_optimizer_just_made(stores, tmp_path: Path, kind: str, zero: int) -> None:
    changes: dict[str, Any] = {"optimizer": {"lr": 3e-3, "kind": kind}, "zero_stage": zero}
    run_ranks(workers.train_run, tree_of(stores, tmp_path / "set_back", **changes), world=1)
    run_ranks(workers.train_with_new_state, tree_of(stores, tmp_path / "new", **changes), world=1)
    assert steps_of(tmp_path / "set_back") == steps_of(tmp_path / "new")


def test_it_is_exact_on_resume_at_the_bound_and_changes_what_follows_alone(stores, tmp_path: Path) -> None:
    run_ranks(workers.train_run, tree_of(stores, tmp_path / "whole", zero_stage=1), world=1)
    run_ranks(workers.train_run, tree_of(stores, tmp_path / "kept", zero_stage=1, restarts=False), world=1)
    (losses, rows), (kept, kept_rows) = steps_of(tmp_path / "whole"), steps_of(tmp_path / "kept")
    # The loss of the first step after the bound is that of the weights before it.
    assert rows == kept_rows and losses[: BOUNDARY + 1] == kept[: BOUNDARY + 1]
    assert losses[BOUNDARY + 1] != kept[BOUNDARY + 1]
    saved = checkpoint_folder(tmp_path / "whole", BOUNDARY)
    tree = tree_of(
        stores, tmp_path / "resumed", zero_stage=1, checkpoint={"every_steps": BOUNDARY, "resume": str(saved)}
    )
    run_ranks(workers.train_run, tree, world=1)
    assert steps_of(tmp_path / "resumed") == (losses[BOUNDARY:], rows[BOUNDARY:])


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
