"""What a person sees of a run: evaluations, and progress that counts from where a resumed run is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from potstill.student_train.run.metrics import read_metrics
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers


def tree_of(stores: dict[str, Path], run: Path, *, steps: int, **changes: Any) -> dict[str, Any]:
    return tiny.config_tree(stores, run, run={"max_steps": steps}, eval={"every_steps": 4}, **changes)


def test_evaluations_are_said_by_the_main_rank(stores: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, other = run_ranks(workers.train_on_a_console, tree_of(stores, run, steps=8), world=2)
    evaluations = [record for record in read_metrics(run) if record["kind"] == "eval"]
    assert [record["step"] for record in evaluations] == [4, 8]
    said = re.findall(r"I \[rank 0\] (step \d/8 held-out .*)", first)
    assert said == [
        f"step {record['step']}/8 held-out loss {record['heldout_loss']:.4f}, "
        f"perplexity {record['perplexity']:.4g}, agreement {record['agreement']:.3f}, "
        f"KL to the teacher {record['teacher_kl']:.4f}"
        for record in evaluations
    ]
    assert "held-out" not in other and "train: " not in other


def test_progress_counts_from_where_a_resumed_run_is_and_ends_with_one_line(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for steps in (4, 8):
        tree = tree_of(stores, run, steps=steps, data={"heldout_targets": None})
        (console,) = run_ranks(workers.train_on_a_console, tree, world=1)
        assert re.search(rf"step {steps}/{steps} held-out loss \d\.\d{{4}}, perplexity [\d.]+$", console, re.MULTILINE)
        progress = re.findall(r"^train: .*", console, re.MULTILINE)
        assert len(progress) == 1, progress
        found = re.fullmatch(rf"train: {steps}/{steps} steps, ([\d,.]+) steps/s, in ([\d.]+)s", progress[0])
        assert found, progress
        # 4 steps were made here, whatever the count says (the rate is written with one decimal place).
        assert abs(float(found[1]) * float(found[2]) - 4) < 0.05 * float(found[2]) + 0.05 * float(found[1]) + 0.1
