"""The teacher's Triton kernels without a GPU: beside torch and a sort in the interpreter, their cost, their budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.kernels import aot_teacher
from tests.kernels.test_triton import run_worker

pytestmark = pytest.mark.xdist_group("teacher_kernels")  # one run of the interpreter for all of them
# nats, and shares of mass: float32 arithmetic, in another order than torch has.
LIMIT = 5e-6


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_worker("interpreted_teacher.py")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", ["shapes", "dtypes", "ties", "bad", "ways"])
def test_every_figure_is_that_of_torch_and_every_id_that_of_a_sort(found: dict[str, Any], part: str) -> None:
    assert len(found[part]) >= 5
    for case, figures in found[part].items():
        if case.endswith(" cap"):  # tanh is rounded in two ways: values are compared, ids may swap
            figures = {**figures, "ids": figures["values"] < 1e-5, "rank": True}
        wrong = [name for name, value in figures.items() if value is False]
        assert not wrong and figures.get("error", 0.0) <= LIMIT, f"{case}: {figures}"


def test_no_tokens_and_labels_that_are_no_ids(found: dict[str, Any]) -> None:
    assert found["ways"]["no tokens"]["shapes"] == [[0, 9], [0], [0]]
    assert found["labels"] == {"nan": [True, True], "none": 0.0, "rank": [255, 255, 255]}


@pytest.mark.parametrize("temperatures", ["()", "(2.0,)"])
def test_the_logits_are_read_once_where_they_lie_in_two_launches(found: dict[str, Any], temperatures: str) -> None:
    """Bytes read by count: the logits, the figures of their tiles, and the tiles that hold the k best (k = 64)."""
    cost = found["costs"][temperatures]
    assert cost["launches"] == 2
    assert cost["same memory"] == [True, True] and cost["copies"] == [False, False]
    assert cost["read"] <= 1.3 and cost["written"] <= 0.15, cost
    # On a CPU the labels' values are checked; all that is left is the tensor of no labels.
    assert set(cost["operations"]) <= {"aten.full.default", "aten.max.default", "aten._local_scalar_dense.default"}


@pytest.mark.parametrize(("vocab_size", "k", "temperatures"), [(128256, 64, 0), (262144, 255, 2), (50257, 1, 1)])
def test_the_compiler_sees_the_launcher_s_shapes(vocab_size: int, k: int, temperatures: int) -> None:
    from potstill.kernels import teacher_triton

    parts = -(-vocab_size // (64 * teacher_triton.TILES_PER_STEP * teacher_triton.STEPS_PER_PROGRAM))
    ours = teacher_triton.select_shape(vocab_size, k, temperatures, parts)
    assert ours == aot_teacher.select_shape(vocab_size, k, temperatures, parts)
    tile = aot_teacher.tile_case("bf16")
    assert tile["constants"]["TPP"] == teacher_triton.TILES_PER_STEP and tile["warps"] == teacher_triton.TILE_WARPS


@pytest.mark.slow
def test_the_kernels_keep_their_budgets(tmp_path: Path) -> None:
    table = run_worker("aot_worker.py", "tiles-bf16", "select-bf16-64", cache=tmp_path)
    aot_teacher.check_budget(table)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_variant_keeps_its_budget(tmp_path: Path) -> None:
    aot_teacher.check_budget(run_worker("aot_worker.py", *aot_teacher.cases(), cache=tmp_path))
