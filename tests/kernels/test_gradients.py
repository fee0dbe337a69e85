"""The kernels of backward without a GPU: in the interpreter against float64, and compiled against budgets."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.test_triton import run_worker

pytest.importorskip("triton")
ROUNDING = 2.0**-11  # of float16


def test_gradient_kernels_equal_float64_in_the_interpreter() -> None:
    found = run_worker("gradients_worker.py")
    assert len(found) > 65
    assert "modified by an inplace operation" in found.pop("change")["error"]
    for case, figures in found.items():
        if case.startswith("scale"):
            assert figures["same"] and figures["error"] == 0.0, (case, figures)
        elif case.startswith("weight"):
            assert figures["same"] and figures["error"] < ROUNDING, (case, figures)
        else:
            # bfloat16 has 8 bits, and the interpreter truncates to it.
            limit = 2.0**-6 if "bfloat16" in case else 2 * ROUNDING
            assert figures["error"] < limit, (case, figures)
    assert found["single bfloat16"]["held"] == "torch.bfloat16" and found["single float16"]["held"] == "torch.float32"
    kept = {case: figures for case, figures in found.items() if case.startswith("kept")}
    assert all(figures["kept"] for figures in kept.values())
    assert {figures["chunks"] for figures in kept.values()} >= {1, 2}


def test_compiled_gradient_kernels_do_not_spill(tmp_path: Path) -> None:
    table = run_worker("gradients_aot_worker.py", cache=tmp_path)
    assert len(table) == 6
    for case, cost in table.items():
        assert cost["spilled"] == 0 and cost["wide_loads"] > 0, (case, cost)
        if case.startswith("weight"):
            # One block on an SM: a register more than 255 a thread cannot have, and an H100 227 KiB.
            assert cost["registers"] <= 255 and cost["shared"] <= 227 << 10, (case, cost)
            assert cost["tensor_cores"] and cost["async_copies"], (case, cost)
        else:
            assert cost["registers"] <= 64, (case, cost)
