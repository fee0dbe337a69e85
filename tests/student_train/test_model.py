"""The student module: documents are kept apart, short rows cost nothing, and the loss is that of the logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from potstill.kernels import backends
from potstill.kernels.backend import Backend
from potstill.storage import LoadedBatch, StoreReader
from potstill.student_train.config.stages import Objective, Stage
from potstill.student_train.curriculum.step_objective import StepObjective, step_objective
from potstill.student_train.data.batch import MicroBatch, collate, position_ids
from potstill.student_train.model.head import SparseLossRequest
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.model.parameters import check_initial_std
from potstill.student_train.model.student import StudentModel, TrainRequest, build_student
from tests.student_train import tiny, workers


@pytest.fixture(scope="module")
def student(start_weights: Path) -> StudentModel:
    config = workers.config_of(
        {
            "run": {"output_dir": "x", "max_steps": 1},
            "model": {"path": str(start_weights)},
            "data": {"tokens": "x", "global_batch_rows": 1},
        }
    ).model
    return build_student(config, hf_config(config, vocab_size=tiny.VOCAB), seed=0).double()


def batch_of(stores: dict[str, Path], rows: list[int]) -> LoadedBatch:
    readers = {name: StoreReader(stores[name]) for name in ("tokens", "teacher", "scores")}
    joined = {"teacher": readers["teacher"].rows(rows), "slm": readers["scores"].rows(rows)}
    return LoadedBatch(batch=0, rows=np.array(rows), tokens=readers["tokens"].rows(rows), joined=joined)


def micro_of(stores: dict[str, Path], rows: list[int], **stage):
    objective = step_objective(Objective(), Stage.model_validate({"targets": "teacher", **stage}), 0.0)
    micros = collate(batch_of(stores, rows), objective, micro_batch_rows=len(rows), row_length=tiny.ROW_LENGTH)
    return micros[0], objective


def named_sums(student: StudentModel, micro: MicroBatch, objective: StepObjective) -> dict[str, float]:
    _, sums = student(TrainRequest(micro, objective, torch.tensor(1.0), 1))
    return dict(zip(student.sum_names, sums.tolist(), strict=True))


def test_positions_restart_and_labels_stop_at_documents() -> None:
    row = tiny.token_rows(2)[0]
    row = replace(row, tokens=np.arange(7, dtype=np.int32), doc_lens=np.array([3, 4], np.int32))
    assert position_ids(row.doc_lens, 9).tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert row.labels().tolist() == [1, 2, -100, 4, 5, 6, -100]


def test_a_packed_row_equals_its_documents_run_apart(stores, student: StudentModel) -> None:
    micro, _ = micro_of(stores, [0, 39, 1])  # row 39 is shorter than the others
    packed = student.hidden_states(micro)
    apart = []
    for row in batch_of(stores, [0, 39, 1]).tokens:
        for start, size in zip(np.cumsum(row.doc_lens) - row.doc_lens, row.doc_lens, strict=True):
            ids = torch.from_numpy(row.tokens[start : start + size].astype(np.int64)).unsqueeze(0)
            apart.append(student.hf.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
    assert packed.shape[0] == 32 + 20 + 32
    torch.testing.assert_close(packed, torch.cat(apart), rtol=1e-9, atol=1e-9)


def test_the_loss_is_that_of_the_logits(stores, student: StudentModel) -> None:
    micro, objective = micro_of(stores, [0, 39], alpha=0.7)
    with torch.no_grad():
        loss, sums = student(TrainRequest(micro, objective, torch.tensor(10.0), 1))
        logits = student.hf.lm_head(student.hidden_states(micro))
    log_q = F.log_softmax(logits, -1)
    found = micro.labels >= 0
    ce = -log_q[found].gather(1, micro.labels[found, None]).sum()
    kd = 0.0
    for n in range(len(micro.labels)):
        entries = slice(int(micro.targets.offsets[n]), int(micro.targets.offsets[n + 1]))
        ids, log_p = micro.targets.ids[entries].long(), micro.targets.logprobs[entries].double()
        if len(ids):
            rest = 1 - log_q[n, ids].exp().sum()
            tail = micro.targets.log_tail[n].double()
            # Both are stored on a grid, so the loss scales the k + 1 buckets to sum to 1.
            norm = torch.logaddexp(log_p.logsumexp(0), tail)
            log_p, tail = log_p - norm, tail - norm
            kd += (log_p.exp() * (log_p - log_q[n, ids])).sum() + tail.exp() * (tail - rest.log())
    assert float(loss) == pytest.approx(float(0.7 * kd + 0.3 * ce) / 10, rel=1e-9)
    named = dict(zip(student.sum_names, sums.tolist(), strict=True))
    assert named["ce"] == pytest.approx(float(ce), rel=1e-5)
    assert named["kd"] == pytest.approx(float(kd), rel=1e-5)
    assert named["labelled"] == named["positions"] == float(found.sum()) == micro.weight_sum


@pytest.mark.parametrize(
    "tokens",
    [
        {"policy": "top_entropy", "share": 0.3},
        {"policy": "soft_or", "share": 0.5, "floor": 0.1},
        {"policy": "paced"},
        {"policy": "excess_loss", "reference": "slm", "share": 0.4},
        {"policy": "label_rank", "source": "slm", "max_rank": 3},
        {"policy": "random", "share": 0.2},
    ],
)
def test_the_weight_sum_of_a_choice_is_known_before_the_forward(stores, student: StudentModel, tokens) -> None:
    micro, objective = micro_of(stores, [3, 39], tokens=tokens)
    named = named_sums(student, micro, objective)
    assert named["weight"] == pytest.approx(micro.weight_sum, rel=1e-5)
    assert 0 < named["positions"] <= named["labelled"]


def test_kd_only_selection_leaves_the_labels_alone(stores, student: StudentModel) -> None:
    choice = {"policy": "skip_low_entropy", "source": "teacher", "share": 0.85, "applies_to": "kd"}
    micro, objective = micro_of(stores, [3, 4], tokens=choice)
    named = named_sums(student, micro, objective)
    assert named["positions"] == named["labelled"] > named["kd_positions"] > 0
    assert named["kd_weight"] < named["label_weight"] == micro.weight_sum


def test_unselected_positions_have_no_gradient_through_the_head(stores, student: StudentModel) -> None:
    micro, objective = micro_of(stores, [5], tokens={"policy": "random", "share": 0.25})
    hidden = student.hidden_states(micro).detach().requires_grad_()
    student.hf.lm_head(hidden, SparseLossRequest(micro, objective, torch.tensor(1.0)))[0].backward()
    moved = hidden.grad.abs().sum(1) > 0
    assert torch.equal(moved, micro.token_weights > 0)


def test_the_configured_backend_computes_every_loss_of_a_step(stores, monkeypatch) -> None:
    """Choice of positions, self-check and loss; the self-check's own reference is torch's, asked for by name."""
    asked: list[tuple[str, torch.dtype]] = []
    choose = backends.choose

    def noting(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
        asked.append((name, dtype))
        return choose("auto", device, dtype)

    monkeypatch.setattr(backends, "choose", noting)
    model = {"config": dict(tiny.STUDENT), "loss_backend": "triton"}
    tree = tiny.config_tree(stores, Path("x"), model=model)
    config = workers.config_of(tree).model
    student = build_student(config, hf_config(config, vocab_size=tiny.VOCAB), seed=0)
    micro, objective = micro_of(stores, [3, 39], tokens={"policy": "top_entropy", "share": 0.3})
    student(TrainRequest(micro, objective, torch.tensor(10.0), 1, self_check=True))
    assert asked == [("triton", torch.float32)] * 2 + [("torch", torch.float64), ("triton", torch.float32)]


def test_the_wrong_initial_std_is_refused(student: StudentModel) -> None:
    config = student.hf.config
    assert config.initializer_range == 0.1
    check_initial_std(student.hf, config)
    student.hf.config.initializer_range = 0.02
    try:
        with pytest.raises(RuntimeError, match=r"expected 0\.02"):
            check_initial_std(student.hf, config)
    finally:
        student.hf.config.initializer_range = 0.1
