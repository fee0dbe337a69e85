"""Mixtures of experts as students: they train like any other, and only the experts of a token count as work."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from potstill.storage import LoadedBatch, StoreReader
from potstill.student_train.config.stages import Objective, Stage
from potstill.student_train.curriculum.step_objective import step_objective
from potstill.student_train.data.batch import collate
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.model.parameters import active_parameters, count_parameters
from potstill.student_train.model.router import RouterBalance
from potstill.student_train.model.student import StudentModel, TrainRequest, build_student
from potstill.student_train.run.engine import Topology
from potstill.student_train.run.metrics import ModelCost, read_metrics
from potstill.student_train.run.trainer import model_cost
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers

ROUTED = {"num_experts_per_tok": 2, "initializer_range": 0.1}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {**ROUTED, "num_local_experts": 4},
    "qwen3_moe": {**ROUTED, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16},
    "qwen2_moe": {
        **ROUTED,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 32,
    },
}
# Per layer: width 32 times three matrices of an expert, times the experts.
EXPERT_PARAMETERS = {"mixtral": 2 * 4 * 3 * 32 * 48, "qwen3_moe": 2 * 4 * 3 * 32 * 24, "qwen2_moe": 2 * 4 * 3 * 32 * 24}


def tree_of(kind: str, stores: dict[str, Path], output: Path, **changes: Any) -> dict[str, Any]:
    tree = tiny.config_tree(stores, output, **changes)
    tree["model"]["config"] = {**tiny.STUDENT, "model_type": kind, **KINDS[kind]}
    return tree


def build(kind: str, stores: dict[str, Path]) -> tuple[StudentModel, Any]:
    config = workers.config_of(tree_of(kind, stores, Path("unused"))).model
    student_config = hf_config(config, vocab_size=tiny.VOCAB)
    return build_student(config, student_config, seed=0), student_config


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_packing_gradients_and_cost(stores, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="potstill"):
        student, student_config = build(kind, stores)
    [balance] = [term for term in student.terms if isinstance(term, RouterBalance)]
    assert balance.coefficient == student_config.router_aux_loss_coef > 0
    assert "load balancing" not in caplog.text
    rows = [0, 39]
    readers = {name: StoreReader(stores[name]) for name in ("tokens", "teacher")}
    tokens = readers["tokens"].rows(rows)
    batch = LoadedBatch(batch=0, rows=np.array(rows), tokens=tokens, joined={"teacher": readers["teacher"].rows(rows)})
    objective = step_objective(Objective(), Stage.model_validate({"targets": "teacher"}), 0.0)
    [micro] = collate(batch, objective, micro_batch_rows=2, row_length=tiny.ROW_LENGTH)
    apart = []
    for row in tokens:
        ids = torch.from_numpy(row.tokens.astype(np.int64))
        apart += [
            student.hf.base_model(input_ids=part.unsqueeze(0), use_cache=False).last_hidden_state[0]
            for part in ids.split(row.doc_lens.tolist())
        ]
    torch.testing.assert_close(student.hidden_states(micro), torch.cat(apart), rtol=1e-3, atol=1e-4)

    student(TrainRequest(micro, objective, torch.tensor(10.0), 1, self_check=True))[0].backward()
    idle = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == [], "experts and router learn too"

    active = count_parameters(student) - EXPERT_PARAMETERS[kind] // 2
    assert active_parameters(student, student_config) == active
    cost = model_cost(student, student_config, tiny.ROW_LENGTH, Topology(0, 1, torch.device("cpu")))
    assert cost.per_token == 6 * (active - tiny.VOCAB * 32) + 6 * 2 * 32 * tiny.ROW_LENGTH


def test_unknown_routing_has_no_mfu(stores) -> None:
    student, _ = build("mixtral", stores)
    assert active_parameters(student, SimpleNamespace(num_local_experts=4)) is None
    cost = ModelCost(per_token=None, per_position=1.0, peak=1e12)
    sums = {"tokens": 4.0, "positions": 2.0, "labelled": 4.0}
    assert cost.utilisation(sums, seconds=1.0, world_size=1) is None and cost.saved_share(sums) is None


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("mixtral", 2),
        pytest.param("qwen3_moe", 3, marks=pytest.mark.slow),
        pytest.param("qwen2_moe", 1, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_what_one_does(stores, tmp_path: Path, kind: str, stage: int) -> None:
    losses, balances = [], []
    for world, zero in ((1, 0), (2, stage)):
        run = tmp_path / f"ranks{world}"
        tree = tree_of(kind, stores, run, run={"max_steps": 2}, zero_stage=zero, logging={"every_steps": 1})
        tree["model"]["router_aux_loss"] = 0.5
        run_ranks(workers.train_run, tree, world=world)
        records = [record for record in read_metrics(run) if record["kind"] == "train"]
        losses.append([record["loss"] for record in records])
        balances.append([record["router_aux"] for record in records])
        for record in records:
            parts = 0.5 * record["kd"] + 0.5 * record["ce"] + 0.5 * record["router_aux"]
            assert record["loss"] == pytest.approx(parts, rel=1e-4)
    assert len(losses[0]) == 2 and all(math.isfinite(loss) for loss in losses[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert balances[1] == pytest.approx(balances[0], rel=1e-4)
    assert all(1.5 < balance < 4 for balance in balances[0]), "2 experts of 4: 2 when balanced, 4 when collapsed"
