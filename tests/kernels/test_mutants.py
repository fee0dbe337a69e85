"""Planted faults: each must fail a check of kernel_battery.py, or a real one like it would pass as well.

python -m pytest -m slow tests/kernels/test_mutants.py     # a second or more for each
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.mutant import Mutant
from tests.kernels.mutants import MUTANTS

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
NUM_CHECKS = 50
slow = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.xdist_group("mutants")]


@pytest.fixture(scope="module")
def reports() -> dict[str | None, dict[str, Any]]:
    """What the battery said of the kernels as they are (None) and of each mutant, by name."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    worker = str(Path(__file__).with_name("mutant_worker.py"))
    done = subprocess.run([sys.executable, worker], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return {report["name"]: report for report in map(json.loads, done.stdout.splitlines())}


def marked(mutant: Mutant) -> Any:
    return pytest.param(mutant, marks=slow, id=mutant.name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.xdist_group("mutants")
def test_the_kernels_as_they_are_pass(reports: dict[str | None, dict[str, Any]]) -> None:
    report = reports[None]
    assert report["status"] == 0 and not report["failed"], report
    assert report["kernels"] == report["copy"] and report["checks"] >= NUM_CHECKS


@pytest.mark.parametrize("mutant", [marked(mutant) for mutant in MUTANTS])
def test_a_planted_fault_is_noticed(mutant: Mutant, reports: dict[str | None, dict[str, Any]]) -> None:
    report = reports[mutant.name]
    assert report["status"] != 0, f"{mutant.name}: all {report.get('checks')} checks passed"
    failed = list(report.get("failed", {}).values())
    # A fault that reads or writes far outside ends the process, which is noticed too. One that only keeps the kernel
    # from running shows nothing.
    assert failed or report["status"] < 0, f"{mutant.name}: the battery did not run: {report['errors']}"
    assert mutant.may_raise or not any(text.startswith("raised") for text in failed), f"{mutant.name}: {failed}"
    assert not failed or report["kernels"] == report["copy"], f"the battery ran {report['kernels']}, not the copy"


def test_every_mutant_can_be_planted(tmp_path: Path) -> None:
    """Texts follow the kernels, in the suite of every day; and no two mutants are called the same."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 60
    source = ROOT / "src" / "potstill" / "kernels"
    for number, mutant in enumerate(MUTANTS):
        kernels = tmp_path / str(number)
        kernels.mkdir()
        for path in source.glob(mutant.path):
            shutil.copy(path, kernels)
        mutant.plant(kernels)
        for path in kernels.iterdir():
            compile(path.read_text(encoding="utf-8"), path.name, "exec")
