"""The kernel benchmarks run, on shapes so small that their figures mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def last_line(*command: str) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_gpu_benchmark_runs_as_a_smoke_test(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    figures = last_line("benchmarks.gpu_kernels", "--smoke", "--output", str(output))
    assert "smoke" in figures["measured_on"]
    rows = json.loads(output.read_text())["rows"]
    assert {row["what"] for row in rows} == {"logits", "linear", "teacher", "teacher hidden"}
    errors = [row["error_rest"] for row in rows if row["error_rest"] is not None]
    # Gradients of bf16 logits: rounded once, on the kept ids and off them alike.
    assert errors and max(errors) < 6e-3
    # Liger's runs on a GPU alone; all else must have run.
    assert not [row for row in rows if row["note"] and not row["variant"].startswith("Liger")]


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_cpu_benchmark_runs() -> None:
    small = ("--tokens", "32", "--vocabulary", "500", "--width", "16", "--k", "8", "--repeats", "1")
    figures = last_line("benchmarks.cpu_kernels", *small)
    assert {"time_over_eager", "time_over_compile", "peak_bytes_over_eager", "half_selected_over_all"} <= set(figures)
