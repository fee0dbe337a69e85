"""The benchmarks of whole steps and of the dump run, so small that their figures mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--vocab-size", "96", "--hidden-size", "64", "--num-layers", "1", "--row-length", "32", "--top-k", "8")
STEPS = ("--steps", "3", "--warmup-steps", "1", "--repeats", "1", "--batch-rows", "4", "--micro-batch-rows", "2")
DUMP = ("--hidden", "64", "--layers", "1", "--vocab", "256", "--rows", "4", "--row-length", "32", "--rounds", "1")


def run(name: str, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", f"benchmarks.{name}", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.mark.parametrize(
    ("name", "words", "keys"),
    [
        ("step", (*SMALL, *STEPS), {"kd_step_over_ce_step", "data_wait_share"}),
        ("selector", (*SMALL, *STEPS), {"half_selected_step_over_all", "half_selected_head_over_all"}),
        ("dump", (*DUMP, "--k", "8"), {"dump_over_forward", "encode_tokens_per_core_s", "peak_bytes"}),
    ],
)
def test_a_benchmark_ends_with_its_figures(name: str, words: tuple[str, ...], keys: set[str], tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    done = run(name, *words, "--output", str(output))
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert keys | {"machine", "versions", "date", "settings"} <= set(figures)
    assert json.loads(output.read_text()) == figures


def test_sizes_that_make_no_store_are_refused_by_name() -> None:
    done = run("step", "--vocab-size", "8", "--top-k", "8", code=2)
    assert "--vocab-size 8 must be above --top-k 8" in done.stderr
