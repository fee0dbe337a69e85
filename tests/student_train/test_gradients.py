"""Gradients: DeepSpeed on two ranks equals one rank equals plain torch, and communication is really there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers

# Selected positions differ from rank to rank and micro-batch to micro-batch.
SELECTED = [{"targets": "teacher", "tokens": {"policy": "label_rank", "source": "slm", "max_rank": 6}}]


def tree_of(stores: dict[str, Path], start: Path, **changes: Any) -> dict[str, Any]:
    changes = {"curriculum": SELECTED, "optimizer": {"lr": 1e-3, "grad_clip": 0.0}, **changes}
    model = {"path": str(start), "config": None, **changes.pop("model", {})}
    tree = tiny.config_tree(stores, Path("unused"), **changes)
    return {**tree, "model": {key: value for key, value in model.items() if value is not None}}


def distance(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Norm of the difference over the norm, over all parameters together."""
    assert found.keys() == expected.keys()
    difference = np.sqrt(sum(float(((found[n] - expected[n]) ** 2).sum()) for n in expected))
    return difference / np.sqrt(sum(float((expected[n] ** 2).sum()) for n in expected))


def check(tree: dict[str, Any], *, tolerance: float) -> None:
    exact = workers.plain_gradients({**tree, "model": {"path": tree["model"]["path"]}})
    two = run_ranks(workers.engine_gradients, tree, world=2)
    one = run_ranks(workers.engine_gradients, tree, world=1)
    assert distance(one[0], exact) < tolerance
    assert distance(two[0], exact) < tolerance
    assert distance(two[1], exact) < tolerance
    half = len(range(tree["data"]["global_batch_rows"])) // 2
    alone = workers.plain_gradients({**tree, "model": {"path": tree["model"]["path"]}}, rows=slice(0, half))
    doubled = {name: 2 * value for name, value in alone.items()}
    assert min(distance(alone, exact), distance(doubled, exact)) > 0.1, "the test could not see missing communication"


# float32 sums of some hundred terms: relative error of the order of 1e-6.
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_one_rank_and_plain_torch(stores, start_weights, stage: int) -> None:
    data = {"global_batch_rows": 6, "micro_batch_rows": 1 if stage in (1, 3) else 3}
    check(tree_of(stores, start_weights, zero_stage=stage, data=data), tolerance=1e-5)


# bfloat16 keeps 8 bits: weights, activations and gradients each carry 2^-9 of relative error.
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_gradients(stores, start_weights, stage: int) -> None:
    data = {"global_batch_rows": 6, "micro_batch_rows": 1}
    check(tree_of(stores, start_weights, zero_stage=stage, data=data, model={"dtype": "bfloat16"}), tolerance=3e-2)


@pytest.mark.parametrize(("temperature", "missing_mass"), [(2.0, "tail"), (4.0, "renorm"), (1e-3, "renorm")])
def test_a_temperature_of_the_teacher_alone(stores, start_weights, temperature: float, missing_mass: str) -> None:
    """The engine's step has the gradient of the formula on whole logits: the student at 1, no T^2."""
    objective = {"temperature": temperature, "temperature_side": "teacher", "missing_mass": missing_mass}
    tree = tree_of(stores, start_weights, curriculum=[{"targets": "teacher"}], objective=objective)
    exact = workers.tempered_teacher_gradients(tree, temperature, whole=missing_mass == "tail")
    assert distance(workers.plain_gradients(tree), exact) < 1e-6
    assert distance(run_ranks(workers.engine_gradients, tree, world=1)[0], exact) < 1e-5
    other = {**tree, "objective": {**tree["objective"], "temperature_side": "both"}}
    assert distance(workers.plain_gradients(other), exact) > 0.1, "the test could not see the side"


# Weights that only the forward pass knows: the student's own figures choose, inside the head that ZeRO-3 has cut.
BY_STUDENT = {"policy": "paced", "source": "student", "floor": 0.2}
KD_ONLY = {"policy": "skip_low_entropy", "source": "teacher", "share": 0.5, "applies_to": "kd"}


@pytest.mark.parametrize(
    ("stage", "tokens"),
    [
        (3, BY_STUDENT),
        pytest.param(1, BY_STUDENT, marks=pytest.mark.slow),
        pytest.param(2, KD_ONLY, marks=pytest.mark.slow),
        pytest.param(3, KD_ONLY, marks=pytest.mark.slow),
    ],
)
def test_soft_weights_and_kd_weights(stores, start_weights, stage: int, tokens: dict[str, Any]) -> None:
    curriculum = [{"targets": "teacher", "tokens": tokens}]
    data = {"global_batch_rows": 6, "micro_batch_rows": 1}
    check(tree_of(stores, start_weights, zero_stage=stage, data=data, curriculum=curriculum), tolerance=1e-5)


@pytest.fixture(scope="module")
def untied_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(12)
    values = {**tiny.STUDENT, "tie_word_embeddings": False, "initializer_range": 0.1, "vocab_size": tiny.VOCAB}
    folder = tmp_path_factory.mktemp("untied") / "llama"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_head_of_its_own(stores, untied_weights, stage: int) -> None:
    data = {"global_batch_rows": 6, "micro_batch_rows": 1}
    check(tree_of(stores, untied_weights, zero_stage=stage, data=data), tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_with_the_optimizer_in_host_memory(stores, start_weights, stage: int, dtype: str) -> None:
    data = {"global_batch_rows": 6, "micro_batch_rows": 1}
    passed = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    tree = tree_of(stores, start_weights, zero_stage=stage, data=data, deepspeed=passed, model={"dtype": dtype})
    check(tree, tolerance=1e-5 if dtype == "float32" else 3e-2)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_batch_rows", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradient_matrix(stores, start_weights, stage, dtype, micro_batch_rows, checkpointing) -> None:
    data = {"global_batch_rows": 6, "micro_batch_rows": micro_batch_rows}
    model = {"dtype": dtype, "gradient_checkpointing": checkpointing}
    tree = tree_of(stores, start_weights, zero_stage=stage, data=data, model=model)
    check(tree, tolerance=1e-5 if dtype == "float32" else 3e-2)
