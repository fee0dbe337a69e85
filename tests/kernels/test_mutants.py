"""Planted faults: each must fail a check of kernel_battery.py, or a real one like it would pass as well.

python -m pytest -m slow tests/kernels/test_mutants.py -n 2     # about a process of 10 s for each mutant
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.mutants import MUTANTS, Mutant

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
BATTERY = Path(__file__).with_name("kernel_battery.py")
NUM_CHECKS = 50


def copy_of_package(folder: Path) -> Path:
    """A folder with the package, its kernels as files of its own, everything else linked to this checkout."""
    package = ROOT / "src" / "potstill"
    copy = folder / "src" / "potstill"
    copy.mkdir(parents=True)
    for entry in package.iterdir():
        if entry.name == "kernels":
            shutil.copytree(entry, copy / "kernels", symlinks=False, ignore=shutil.ignore_patterns("__pycache__"))
        elif entry.name != "__pycache__":
            (copy / entry.name).symlink_to(entry.resolve())
    return copy


def plant(mutant: Mutant, kernels: Path) -> None:
    """The fault, in a copied file. AssertionError, with what to do, where its text does not stand there once."""
    path = kernels / mutant.path
    assert path.exists(), f"mutant {mutant.name!r}: {mutant.path} is gone; name the file that has its text now"
    source = path.read_text(encoding="utf-8")
    count = source.count(mutant.old)
    assert count == 1, (
        f"mutant {mutant.name!r}: its text stands {count} times in kernels/{mutant.path}, expected once; bring"
        f" tests/kernels/mutants.py up to date with the kernel: {mutant.old!r}"
    )
    path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")


def run_battery(package: Path, *arguments: str) -> tuple[int, dict, str]:
    """(exit status, what it printed or {}, the end of its errors) of the battery against the kernels of `package`."""
    path = os.pathsep.join([str(package.parent), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BATTERY), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment, cwd=package.parent)
    found = json.loads(done.stdout) if done.stdout.strip() else {}
    if found:
        assert Path(found["kernels"]) == package / "kernels", f"the battery ran {found['kernels']}, not the copy"
    return done.returncode, found, done.stderr[-3000:]


@pytest.mark.slow
def test_the_kernels_as_they_are_pass(tmp_path: Path) -> None:
    status, found, errors = run_battery(copy_of_package(tmp_path))
    assert status == 0 and not found["failed"], (found, errors)
    assert found["checks"] >= NUM_CHECKS


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_fault_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    package = copy_of_package(tmp_path)
    plant(mutant, package / "kernels")
    status, found, errors = run_battery(package, "--first", mutant.seen_by)
    assert status != 0, f"{mutant.name}: all {found.get('checks')} checks passed"
    failed = list(found.get("failed", {}).values())
    # A fault that reads or writes far outside ends the process, which is noticed too. One that only keeps the kernel
    # from running shows nothing.
    assert failed or status < 0, f"{mutant.name}: the battery did not run: {errors}"
    assert mutant.may_raise or not any(text.startswith("raised") for text in failed), f"{mutant.name}: {failed}"


def test_every_mutant_can_be_planted(tmp_path: Path) -> None:
    """Texts follow the kernels, in the suite of every day; and no two mutants are called the same."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 60
    for number, mutant in enumerate(MUTANTS):
        kernels = tmp_path / str(number)
        kernels.mkdir()
        source = ROOT / "src" / "potstill" / "kernels" / mutant.path
        if source.exists():
            shutil.copy(source, kernels / mutant.path)
        plant(mutant, kernels)
        compile((kernels / mutant.path).read_text(encoding="utf-8"), mutant.path, "exec")
