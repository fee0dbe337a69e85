"""The benchmarks of whole steps and of the dump, and the one command for a GPU, so small that figures mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_all import GOALS, PARTS, Part, goals_table, run_parts

ROOT = Path(__file__).resolve().parents[2]
FIGURES = {
    "step": {"kd_step_over_ce_step", "data_wait_share", "host_ms_per_step"},
    "selector": {"half_selected_step_over_all", "half_selected_head_over_all"},
    "dump": {"dump_over_forward", "encode_tokens_per_core_s", "peak_bytes"},
}


def run(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.mark.timeout(600)
def test_one_command_measures_all_there_is(tmp_path: Path) -> None:
    output = tmp_path / "results"
    text = run("benchmarks", "--gpu", "--smoke", "--output", str(output)).stdout
    files = {part.file for part in PARTS} | {"gpu_kernels.txt", "gpu_summary.txt"}
    assert {path.name for path in output.iterdir()} == files
    tests = json.loads((output / "gpu_tests.json").read_text())
    assert {"machine", "versions", "date", "seconds"} <= set(tests)
    assert tests["skipped"] > 0 and not {"failed", "error", "errors"} & set(tests), "a smoke run sees no GPU"
    kernels = json.loads((output / "gpu_kernels.json").read_text())
    assert {"device", "torch", "date"} <= set(kernels["about"]) and kernels["rows"]
    for name, keys in FIGURES.items():
        figures: dict[str, Any] = json.loads((output / f"{name}_gpu.json").read_text())
        assert keys | {"machine", "versions", "date", "settings"} <= set(figures)
    assert all(f"{part.name}: done" in text for part in PARTS)
    table = (output / "gpu_summary.txt").read_text()
    assert all(goal.what in table for goal in GOALS)
    assert "distilled step over the label-only step" in table and "smoke: no meaning" in table
    assert sum(part.limit_seconds for part in PARTS) <= 30 * 60


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    write = "from pathlib import Path; Path('{output}/c.json').write_text('{{}}')"
    words = {"a": "raise SystemExit(3)", "b": "import time; time.sleep(100)", "c": write, "d": "print('no file')"}
    parts = []
    for name, code in words.items():
        (tmp_path / f"part_{name}.py").write_text(code.format(output=tmp_path))
        command = (f"part_{name}",)
        parts.append(Part(name, command, command, 2.0 if name == "b" else 60.0, f"{name}.json"))
    (tmp_path / "a.json").write_text('{"older": 1}')
    outcomes = run_parts(parts, tmp_path, smoke=True)
    assert [outcome.failure for outcome in outcomes] == [
        "ended with code 3",
        "was stopped at its limit of 2 s",
        None,
        "left no d.json",
    ]
    assert not (tmp_path / "a.json").exists(), "an older figure does not stand for this run"
    assert "no file" in (tmp_path / "d.log").read_text() and not (tmp_path / "c.log").exists()
    assert goals_table(outcomes, smoke=False).count("not measured") == len(GOALS)


@pytest.mark.parametrize(
    ("found", "verdict"), [({"dump_over_forward": 0.98}, "met"), ({"dump_over_forward": 0.9}, "MISSED")]
)
def test_a_goal_is_met_or_missed(found: dict[str, float], verdict: str) -> None:
    [goal] = [goal for goal in GOALS if goal.part == "dump"]
    assert goal.verdict(goal.value(found)) == verdict
    [linear] = [goal for goal in GOALS if "peak" in goal.what]
    row = {"what": "linear", "vocabulary": 128256, "width": 2048, "variant": "potstill", "peak_mib": 1771.0}
    assert linear.verdict(linear.value({"rows": [row]})) == "MISSED", "the goal is 1770 MiB"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is asked for")
def test_without_a_gpu_the_command_is_refused(tmp_path: Path) -> None:
    done = run("benchmarks", "--gpu", "--output", str(tmp_path / "out"), code=2)
    assert "no CUDA device" in done.stderr and "--smoke" in done.stderr
    assert not (tmp_path / "out").exists()


def test_sizes_that_make_no_store_are_refused_by_name() -> None:
    done = run("benchmarks.step", "--vocab-size", "8", "--top-k", "8", code=2)
    assert "--vocab-size 8 must be above --top-k 8" in done.stderr
