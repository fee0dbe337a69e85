"""Load balancing loss of mixtures of experts: its weight over ranks and micro-batches, and where it is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.common.errors import ConfigError, UserError
from potstill.storage import LoadedBatch, StoreReader
from potstill.student_train.config.stages import Objective, Stage
from potstill.student_train.curriculum.step_objective import StepObjective, step_objective
from potstill.student_train.data.batch import MicroBatch, collate
from potstill.student_train.data.stores import build_plan, open_stores
from potstill.student_train.model.head import SparseLoss, SparseLossRequest
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.model.student import StudentModel, TrainRequest, build_student
from potstill.student_train.run.metrics import loss_figures, read_metrics
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.student_train.test_gradients import distance
from tests.student_train.test_moe import KINDS, tree_of

COEFFICIENT = 0.7
SHORT_ROW = 39  # 20 tokens of 32: the padding behind them passes the router and must not count


def balanced_tree(kind: str, stores: dict[str, Path], *, stage: int, **model: Any) -> dict[str, Any]:
    """Six rows a step in micro-batches of one row: 2 ranks accumulate 3 each."""
    data = {"global_batch_rows": 6, "micro_batch_rows": 1}
    tree = tree_of(kind, stores, Path("unused"), zero_stage=stage, data=data, optimizer={"grad_clip": 0.0})
    tree["model"] |= {"router_aux_loss": COEFFICIENT, **model}
    return tree


def step_with_the_short_row(tree: dict[str, Any]) -> int:
    config = workers.config_of(tree)
    plan = build_plan(config, open_stores(config))
    return next(step for step in range(plan.total_steps) if SHORT_ROW in plan.rows(step))


def micro_of(stores: dict[str, Path], rows: list[int]) -> tuple[MicroBatch, StepObjective]:
    tokens, teacher = (StoreReader(stores[name]).rows(rows) for name in ("tokens", "teacher"))
    batch = LoadedBatch(batch=0, rows=np.array(rows), tokens=tokens, joined={"teacher": teacher})
    objective = step_objective(Objective(), Stage.model_validate({"targets": "teacher"}), 0.0)
    [micro] = collate(batch, objective, micro_batch_rows=len(rows), row_length=tiny.ROW_LENGTH)
    return micro, objective


def build(stores: dict[str, Path], kind: str = "mixtral", **model: Any) -> StudentModel:
    config = workers.config_of(tree_of(kind, stores, Path("unused"))).model.model_copy(update=model)
    return build_student(config, hf_config(config, vocab_size=tiny.VOCAB), seed=0)


@pytest.mark.parametrize(
    ("kind", "stage", "checkpointing"),
    [
        ("mixtral", 1, False),
        ("mixtral", 2, True),
        ("qwen3_moe", 3, False),
        pytest.param("mixtral", 0, False, marks=pytest.mark.slow),
        pytest.param("mixtral", 3, True, marks=pytest.mark.slow),
        pytest.param("qwen2_moe", 2, False, marks=pytest.mark.slow),
        pytest.param("qwen2_moe", 3, True, marks=pytest.mark.slow),
    ],
)
def test_a_step_gets_the_mean_over_micro_batches_and_ranks(stores, kind: str, stage: int, checkpointing: bool) -> None:
    tree = balanced_tree(kind, stores, stage=stage, gradient_checkpointing=checkpointing)
    step = step_with_the_short_row(tree)
    exact = workers.balanced_gradients(tree, step, coefficient=COEFFICIENT)
    two = run_ranks(workers.engine_gradients, tree, step, world=2)
    # float32 sums of some hundred terms: relative error of the order of 1e-6.
    assert distance(two[0], exact) < 1e-5
    assert distance(two[1], exact) < 1e-5
    # A weight that forgets the ranks, the micro-batches, or all of it would be seen.
    for wrong in (0.0, COEFFICIENT / 2, COEFFICIENT / 3, 2 * COEFFICIENT, 3 * COEFFICIENT):
        assert distance(workers.balanced_gradients(tree, step, coefficient=wrong), exact) > 1e-3


def test_padding_does_not_count(stores) -> None:
    student = build(stores)
    micro, objective = micro_of(stores, [0, SHORT_ROW])
    assert micro.token_index is not None

    def aux(micro: MicroBatch) -> float:
        sums = student(TrainRequest(micro, objective, torch.tensor(10.0), 1))[1]
        return dict(zip(student.sum_names, sums.tolist(), strict=True))["router_aux"]

    before = aux(micro)
    padding = torch.ones(micro.input_ids.numel(), dtype=torch.bool)
    padding[micro.token_index] = False
    micro.input_ids.view(-1)[padding] = 7
    assert aux(micro) == before


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_it_is_what_transformers_adds(stores, kind: str) -> None:
    """A full row: the architecture's own forward knows no padding without a mask."""
    student = build(stores, kind)
    micro, objective = micro_of(stores, [0])
    sums = student(TrainRequest(micro, objective, torch.tensor(10.0), 1))[1]
    hf = build(stores, kind).hf
    hf.eval()
    own = hf(input_ids=micro.input_ids, position_ids=micro.position_ids, output_router_logits=True, use_cache=False)
    found = dict(zip(student.sum_names, sums.tolist(), strict=True))
    assert found["router_batches"] == 1.0
    assert found["router_aux"] == pytest.approx(float(own.aux_loss.detach()), rel=1e-6)


def graph(node: Any) -> list[str]:
    """Names of the autograd nodes behind a tensor, in the order of a walk."""
    names, queue, seen = [], [node], set()
    while queue:
        here = queue.pop(0)
        if here is not None and here not in seen:
            seen.add(here)
            names.append(here.name())
            queue += [following for following, _ in here.next_functions]
    return names


@pytest.mark.parametrize("coefficient", [None, 0.0])
def test_without_it_nothing_changes(stores, coefficient: float | None) -> None:
    """A dense student, and a mixture with the weight 0: the same graph and bits as backbone and head alone."""
    if coefficient is None:
        config = workers.config_of(tiny.config_tree(stores, Path("unused"))).model
        student = build_student(config, hf_config(config, vocab_size=tiny.VOCAB), seed=0)
    else:
        student = build(stores, router_aux_loss=coefficient)
    assert [type(term) for term in student.terms] == [SparseLoss]
    micro, objective = micro_of(stores, [0, SHORT_ROW])
    alone = SparseLossRequest(micro, objective, torch.tensor(10.0))
    plain, plain_sums = student.hf.lm_head(student.hidden_states(micro), alone)
    loss, sums = student(TrainRequest(micro, objective, torch.tensor(10.0), 3))
    assert torch.equal(plain, loss) and torch.equal(plain_sums, sums)
    assert graph(plain.grad_fn) == graph(loss.grad_fn)
    named = dict(zip(student.sum_names, sums.tolist(), strict=True))
    assert loss_figures({**named, "tokens": 1.0})["router_aux"] is None


def test_held_out_figures_are_without_it(stores, tmp_path: Path) -> None:
    figures = []
    for coefficient in (0.0, 50.0):
        run = tmp_path / str(coefficient)
        tree = tree_of("mixtral", stores, run, run={"max_steps": 1}, optimizer={"lr": 1e-12})
        tree["model"]["router_aux_loss"] = coefficient
        run_ranks(workers.train_run, tree, world=1)
        records = {record["kind"]: record for record in read_metrics(run)}
        figures.append((records["eval"]["heldout_loss"], records["train"]["ce"], records["train"]["kd"]))
        assert (records["train"]["router_aux"] is None) == (coefficient == 0.0)
        assert (records["train"]["loss"] > 50) == (coefficient == 50.0)
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_it_trains_in_bfloat16(stores, tmp_path: Path, stage: int) -> None:
    """A strong weight over some steps takes the routers nearer to 2, the value of balance for 2 experts a token."""
    run = tmp_path / "run"
    tree = tree_of("mixtral", stores, run, run={"max_steps": 40}, zero_stage=stage, optimizer={"lr": 1e-2})
    tree["model"] |= {"router_aux_loss": 1.0, "dtype": "bfloat16", "gradient_checkpointing": True}
    run_ranks(workers.train_run, tree, world=2)
    balances = [record["router_aux"] for record in read_metrics(run) if record["kind"] == "train"]
    assert abs(balances[-1] - 2) < 0.5 * abs(balances[0] - 2)


def settled(stores: dict[str, Path], config: dict[str, Any], **model: Any) -> None:
    chosen = workers.config_of(tiny.config_tree(stores, Path("run"), model={"config": config, **model})).model
    hf_config(chosen, vocab_size=tiny.VOCAB)


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_a_weight_is_refused_where_there_is_no_such_loss(stores, kind: str) -> None:
    config = {**tiny.STUDENT, "model_type": kind}
    with pytest.raises(UserError, match=rf"model\.router_aux_loss is 0\.01.*'{kind}'.*remove the key"):
        settled(stores, config, router_aux_loss=0.01)
    settled(stores, config, router_aux_loss=0.0)


def test_a_mixture_without_it_gets_a_warning(stores, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="potstill"):
        settled(stores, tiny.STUDENT)
        settled(stores, {"model_type": "deepseek_v3"}, router_aux_loss=0.0)
        assert caplog.text == ""
        settled(stores, {"model_type": "deepseek_v3"})
    assert "deepseek_v3 is a mixture of experts" in caplog.text and "load balancing loss" in caplog.text


def test_a_negative_weight_is_refused(stores) -> None:
    with pytest.raises(ConfigError, match=r"model\.router_aux_loss"):
        settled(stores, tiny.STUDENT, router_aux_loss=-0.1)


def test_experts_in_name_only(stores) -> None:
    student = build(
        stores,
        "qwen3_moe",
        config={**tiny.STUDENT, "model_type": "qwen3_moe", **KINDS["qwen3_moe"]} | {"mlp_only_layers": [0, 1]},
    )
    micro, objective = micro_of(stores, [0])
    with pytest.raises(UserError, match=r"model\.router_aux_loss: no layer"):
        student(TrainRequest(micro, objective, torch.tensor(10.0), 1))
