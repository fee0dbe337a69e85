"""What a run decides on its way, all in one run: scores by the student, a clock of stores, restarts, two sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from potstill.student_train.run import deciders
from potstill.student_train.run.preflight import check_run
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.student_train.test_rescoring import BY_ANSWER, BY_LOSS, masked, told
from tests.student_train.test_resume import cut_back

__all__ = ["masked"]  # a fixture
STEPS, EVERY = 12, 4


def tree_of(stores: dict[str, Path], masked: dict[str, Path], output: Path) -> dict[str, Any]:
    """A stage whose store is taken by evaluations, one weighed by scores, one that ranks the rows of one source by them

    and begins where they are made; the optimizer starts anew in both of the latter.
    """
    tree = tiny.config_tree(
        stores,
        output,
        run={"max_steps": STEPS},
        checkpoint={"every_steps": 1, "keep_last": STEPS},
        eval={"every_steps": 2},
        rescoring={"every_steps": EVERY, "rows": "all", "batch_rows": 5},
        schedule={"kind": "cosine", "span": "stages", "warmup": 0},
        zero_stage=1,
    )
    plain = {"t0": str(stores["early_teacher"]), "t1": str(stores["teacher"])}
    sums = {"t0": str(masked["teacher"]), "t1": str(masked["teacher"])}
    tree["data"] = {
        "sources": {
            "text": {"tokens": str(stores["tokens"]), "targets": plain},
            "sums": {"tokens": str(masked["tokens"]), "targets": sums},
        },
        "heldout": str(stores["heldout"]),
        "global_batch_rows": 4,
        "micro_batch_rows": 1,
    }
    clock = {"stores": {"t0": 3, "t1": 9}, "switch_on": "saturation", "max_steps": 2}
    tree["curriculum"] = [
        {"until": 4, "targets_clock": clock},
        {"until": 8, "targets": "t1", "weights": {**BY_ANSWER, "mean_over": "units"}, "restart_optimizer": True},
        {"targets": "t1", "mix": {"sums": 1}, "rows": {**BY_LOSS, "segments": 1}, "restart_optimizer": True},
    ]
    return tree


def test_a_run_of_all_decisions_resumes_at_any_number_of_ranks(stores, masked, tmp_path: Path) -> None:
    """On two ranks before anything is decided, and on one rank where scores, stage and optimizer begin."""
    whole = tmp_path / "whole"
    run_ranks(workers.train_run, tree_of(stores, masked, whole), world=1)
    losses, digests, scored = told(whole)
    assert len(losses) == STEPS and [line["step"] for line in scored] == [4, 8]
    for step, world in ((1, 2), (8, 1)):
        run = cut_back(whole, tmp_path / str(step), step)
        run_ranks(workers.train_run, tree_of(stores, masked, run), world=world)
        again, rows, lines = told(run)
        assert rows == digests
        assert again == (losses if world == 1 else pytest.approx(losses, rel=1e-4))
        assert [line["means"] for line in lines] == [pytest.approx(line["means"], rel=1e-3) for line in scored]


@pytest.mark.parametrize("left_out", sorted(deciders.DECIDERS))
def test_a_decision_that_nobody_makes_stops_the_run(
    stores, masked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    config = workers.config_of(tree_of(stores, masked, tmp_path / "run"))
    checked = check_run(config, world_size=1)
    assert {decider.name for decider in deciders.build_deciders(config, checked)} == {"rescoring", "targets_clock"}
    monkeypatch.delitem(deciders.DECIDERS, left_out)
    with pytest.raises(RuntimeError, match=r"need the decisions \['rescoring', 'targets_clock'\].*defect"):
        deciders.build_deciders(config, checked)
