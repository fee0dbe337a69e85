"""The benchmarks of whole steps and of the dump, and the one command for a GPU, so small that figures mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.fused_ce import torch_best
from benchmarks.gpu_goals import GOALS
from benchmarks.gpu_parts import PARTS
from benchmarks.step_rivals import label_loss_of
from potstill.kernels.loss import linear_sparse_loss
from potstill.student_train.model import head

ROOT = Path(__file__).resolve().parents[2]
FIGURES = {
    "step": {"kd_step_over_ce_step", "data_wait_share", "host_ms_per_step", "kd_over_torch_ce_by_round", "rivals"},
    "zero": {"steps_per_second", "losses", "loss_relative_difference"},
    "selector": {"half_selected_step_over_all", "half_selected_head_over_all"},
    "dump": {"dump_over_forward", "encode_tokens_per_core_s", "peak_bytes"},
}


def run(*words: str, code: int = 0, seconds: float = 540) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.mark.timeout(600)
def test_one_command_measures_all_there_is(tmp_path: Path) -> None:
    output = tmp_path / "results"
    done = run("benchmarks", "--gpu", "--smoke", "--minutes", "30", "--output", str(output))
    assert {path.name for path in output.iterdir()} == {"summary.md", "summary.json", "log.txt"}
    whole = json.loads((output / "summary.json").read_text())
    walked = {part.name: "done" if part.smoke_words else "not walked" for part in PARTS}
    assert {name: part["state"] for name, part in whole["parts"].items()} == walked
    scripts = {part.words[0] for part in PARTS}
    assert {part.words[0] for part in PARTS if part.smoke_words} == scripts, "each script is walked once at least"
    assert whole["ending"] == "every part that had time ended well"
    assert {"card", "driver", "versions", "commit", "date"} <= set(whole["about"])
    figures: dict[str, Any] = {name: part["figures"] for name, part in whole["parts"].items()}
    assert figures["tests"]["skipped"] > 0 and not figures["tests"]["passed"], "a smoke run sees no GPU"
    kernels = figures["kernels"]
    assert {"device", "torch", "host_us_per_tiny_op"} <= set(kernels["about"])
    assert {row["computes"] for row in kernels["rows"]} >= {"CE + sparse KL", "CE only", "products only"}
    for name, keys in FIGURES.items():
        assert keys | {"machine", "versions", "date", "settings"} <= set(figures[name])
    table = (output / "summary.md").read_text()
    assert all(goal.what in table for goal in GOALS) and "smoke: no meaning" in table
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["goals"].keys() == {goal.what for goal in GOALS} and last["ending"] == whole["ending"]


@pytest.mark.slow  # a GPU run walks it as well
def test_the_step_of_a_rival_trains_on_the_same_loss(tmp_path: Path) -> None:
    """In a process of its own: a run forms a process group, and says so in the environment."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.benchmarks.rival_step_worker", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads(done.stdout.splitlines()[-1])
    assert len(losses[0]) == 3 and losses[0][0] != losses[0][2]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert not list(tmp_path.glob("*/checkpoints"))


def test_a_rival_refuses_a_step_that_distils() -> None:
    tensors = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(2, dtype=torch.int64)}
    with label_loss_of(torch_best()), pytest.raises(ValueError, match="has targets"):
        head.linear_sparse_loss(**tensors, targets=object(), normalizer=torch.ones(()))  # type: ignore[arg-type]
    assert head.linear_sparse_loss is linear_sparse_loss


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is asked for")
def test_without_a_gpu_the_command_is_refused(tmp_path: Path) -> None:
    done = run("benchmarks", "--gpu", "--output", str(tmp_path / "out"), code=2)
    assert "sees no CUDA device" in done.stderr and "--smoke" in done.stderr
    assert not (tmp_path / "out").exists()


def test_sizes_that_make_no_store_are_refused_by_name() -> None:
    done = run("benchmarks.step", "--vocab-size", "8", "--top-k", "8", code=2)
    assert "--vocab-size 8 must be above --top-k 8" in done.stderr


def test_minutes_beyond_what_the_shares_are_made_for_are_refused() -> None:
    assert "must be from 3 to 30" in run("benchmarks", "--gpu", "--minutes", "90", code=2).stderr
