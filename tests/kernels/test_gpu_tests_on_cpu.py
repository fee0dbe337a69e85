"""The GPU tests' own code, tried on the CPU: a slip in it would be found only on a machine that is rarely there.

They run through the torch path at small sizes (tests/gpu/place.py), a few of each kind; all of them by hand:
    POTSTILL_GPU_TESTS_ON_CPU=1 python -m pytest tests/gpu
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# One mode of each parametrised test, and most of those without; the processes of the ZeRO stages take too long here.
FEW = (
    "plain or no_weight or infinity or autocast or statistics_in or sampled or divergence or linear_op or nan_reaches"
    " or teacher_equals or draws_have or with_strides or stride_beyond or list_of_rows or sdpa"
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests themselves run on this machine")
@pytest.mark.timeout(180)
def test_gpu_tests_hold_on_the_cpu() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", FEW]
    done = subprocess.run(
        [*command, "tests/gpu"],
        capture_output=True,
        text=True,
        timeout=170,
        env={**os.environ, "POTSTILL_GPU_TESTS_ON_CPU": "1"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 40, done.stdout[-2000:]
