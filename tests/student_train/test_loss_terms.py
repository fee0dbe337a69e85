"""The seam for loss terms: one class and one entry of the table are a term, and a term that is off costs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from potstill.common.errors import UserError
from potstill.storage import Loader
from potstill.storage.rows.columns import COLUMNS
from potstill.student_train.data.batch import MicroBatch, collate
from potstill.student_train.data.stores import build_plan, open_stores
from potstill.student_train.hf_export.weights import checkpoint_state
from potstill.student_train.model import loss_terms
from potstill.student_train.model.head import SparseLoss
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.model.student import StudentModel, TrainRequest, build_student
from potstill.student_train.run.checkpoint import list_checkpoints
from potstill.student_train.run.metrics import read_metrics
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.student_train.hidden_matching import (
    COLUMN,
    STORE,
    WEIGHT,
    HiddenMatching,
    ProjectedMatching,
    SwitchedOff,
    train_with,
    use,
    vector_of,
    write_vectors,
)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A term entered here is gone behind the test, and the column that it reads."""
    monkeypatch.setattr(loss_terms, "LOSS_TERMS", loss_terms.LOSS_TERMS)
    monkeypatch.setitem(COLUMNS, COLUMN.name, COLUMN)


@pytest.fixture(scope="module")
def vectors(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A targets store with a vector of each row."""
    yield write_vectors(tmp_path_factory.mktemp("vectors") / "store", stores)
    COLUMNS.pop(COLUMN.name, None)


def train_lines(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run) if record["kind"] == "train"]


def tree_of(stores: dict[str, Path], output: Path, vectors: Path | None = None, **changes: Any) -> dict[str, Any]:
    tree = tiny.config_tree(stores, output, run={"max_steps": 3}, logging={"every_steps": 1}, **changes)
    if vectors is not None:
        tree["data"]["targets"][STORE] = str(vectors)
    return tree


def first_batch(tree: dict[str, Any]) -> tuple[StudentModel, list[MicroBatch], list[int], Any]:
    """The student at the start in float64, the micro-batches of step 0, its rows and its objective."""
    config = workers.config_of(tree)
    stores = open_stores(config)
    student = build_student(config.model, hf_config(config.model, vocab_size=tiny.VOCAB), seed=config.run.seed)
    plan = build_plan(config, stores)
    with Loader(plan, stores.tokens, dict(stores.joined)) as loader:
        batch = next(iter(loader))
    sizes = {"micro_batch_rows": config.data.micro_batch_rows, "row_length": tiny.ROW_LENGTH}
    micros = collate(batch, plan.objective(0), terms=student.terms, **sizes)
    return student.double(), micros, [int(row) for row in batch.rows], plan.objective(0)


def by_hand(student: StudentModel, micro: MicroBatch, rows: list[int]) -> torch.Tensor:
    """Mean over these rows of the mean squared error at each one's last token, row by row."""
    hidden, errors = student.hidden_states(micro), []
    for number, row in enumerate(rows):
        last = max(place for place, of in enumerate(micro.row.tolist()) if of == number)
        errors.append(((hidden[last] - torch.from_numpy(vector_of(row)[0]).double()) ** 2).sum() / hidden.shape[1])
    return sum(errors[1:], errors[0]) / len(errors)


def gradients(student: StudentModel, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([grad.reshape(-1) for grad in torch.autograd.grad(loss, list(student.parameters()))])


def test_the_gradient_is_that_of_the_formula(stores: dict[str, Path], vectors: Path) -> None:
    use(HiddenMatching)
    student, micros, rows, objective = first_batch(tree_of(stores, Path("unused"), vectors))
    assert [type(term) for term in student.terms] == [SparseLoss, HiddenMatching]
    loss, sums = student(TrainRequest(micros[1], objective, torch.tensor(50.0), len(micros)))
    plain = StudentModel.__new__(StudentModel)
    plain.__dict__ |= student.__dict__ | {"terms": student.terms[:1]}
    alone, _ = plain(TrainRequest(micros[1], objective, torch.tensor(50.0), len(micros)))
    extra = by_hand(student, micros[1], rows[2:])
    assert float((loss - alone).detach()) == pytest.approx(WEIGHT / len(micros) * float(extra.detach()), rel=1e-9)
    found, expected = gradients(student, loss), gradients(student, alone + WEIGHT / len(micros) * extra)
    without = gradients(student, plain(TrainRequest(micros[1], objective, torch.tensor(50.0), len(micros)))[0])
    # The norms of the architecture work in float32: its rounding, in another order of sums.
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    assert float((without - expected).norm() / expected.norm()) > 1e-3
    named = dict(zip(student.sum_names, sums.tolist(), strict=True))
    assert named["hidden_rows"] == 2 and named["hidden_error"] == pytest.approx(2 * float(extra.detach()), rel=1e-6)


@pytest.mark.parametrize("world", [1, 2])
def test_its_sums_are_in_the_metrics_of_a_run(
    stores: dict[str, Path], vectors: Path, tmp_path: Path, world: int
) -> None:
    tree = tree_of(stores, tmp_path / "run", vectors, zero_stage=2)
    run_ranks(train_with, tree, HiddenMatching, world=world)
    lines = train_lines(tmp_path / "run")
    for line in lines:
        parts = 0.5 * line["kd"] + 0.5 * line["ce"] + WEIGHT * line["hidden_error"]
        assert line["loss"] == pytest.approx(parts, rel=1e-4)
    use(HiddenMatching)
    student, micros, rows, _ = first_batch(tree)
    wanted = [float(by_hand(student, micro, rows[2 * i : 2 * i + 2]).detach()) for i, micro in enumerate(micros)]
    assert lines[0]["hidden_error"] == pytest.approx(np.mean(wanted), rel=1e-5)
    assert "hidden_error" not in read_metrics(tmp_path / "run")[-1], "held-out figures are those of the model"


def test_a_run_without_it_is_unchanged(stores: dict[str, Path], tmp_path: Path) -> None:
    run_ranks(workers.train_run, tree_of(stores, tmp_path / "plain"), world=1)
    run_ranks(train_with, tree_of(stores, tmp_path / "off"), SwitchedOff, world=1)
    plain, off = (train_lines(tmp_path / name) for name in ("plain", "off"))
    same = ("step_losses", "grad_norm", "row_digests", "ce", "kd", "entropy", "agreement", "lr")
    assert [[line[name] for name in same] for line in plain] == [[line[name] for name in same] for line in off]
    assert all("hidden_error" not in line for line in plain)
    assert all(line["hidden_error"] is None for line in off)


@pytest.mark.parametrize(("stage", "world"), [(1, 1), (3, 2)])
def test_a_term_with_weights_of_its_own(
    stores: dict[str, Path], vectors: Path, tmp_path: Path, stage: int, world: int
) -> None:
    tree = tree_of(stores, tmp_path / "run", vectors, zero_stage=stage)
    run_ranks(train_with, tree, ProjectedMatching, world=world)
    [checkpoint] = list_checkpoints(tmp_path / "run")
    use(ProjectedMatching)
    student, micros, rows, objective = first_batch(tree)
    _, sums = student(TrainRequest(micros[0], objective, torch.tensor(1.0), 1))
    error = dict(zip(student.sum_names, sums.tolist(), strict=True))["hidden_error"]
    first = train_lines(tmp_path / "run")[0]["hidden_error"]
    others = [student(TrainRequest(micro, objective, torch.tensor(1.0), 1))[1][-2] for micro in micros[1:]]
    assert first == pytest.approx((error + float(sum(others))) / len(rows), rel=1e-5)
    name = "term_modules.0.projection.weight"
    saved = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.folder.parent), tag=checkpoint.folder.name)
    moved = (saved[name] - student.state_dict()[name].float()).abs().detach()
    assert 1e-4 < float(moved.max()) < 0.1, "AdamW moves each weight by about the learning rate"
    assert checkpoint.manifest["num_parameters"] == sum(p.numel() for p in student.parameters())
    # The extra weights are no part of what is exported.
    exported = set(checkpoint_state(checkpoint))
    assert exported and exported <= set(student.hf.state_dict())


def test_two_terms_may_not_share_a_name() -> None:
    with pytest.raises(ValueError, match="hidden_error"):
        loss_terms.sum_names((HiddenMatching(), SwitchedOff()))


def test_a_term_with_other_sums_than_it_names_is_refused(stores: dict[str, Path], vectors: Path) -> None:
    class Wrong(HiddenMatching):
        sum_names = ("hidden_error", "hidden_rows", "third")

    use(Wrong)
    student, micros, _, objective = first_batch(tree_of(stores, Path("unused"), vectors))
    with pytest.raises(RuntimeError, match=r"Wrong gave sums of shape \(2,\), expected one for each"):
        student(TrainRequest(micros[0], objective, torch.tensor(1.0), 1))


def test_stores_of_a_term_are_read_at_every_step(stores: dict[str, Path], vectors: Path) -> None:
    config = workers.config_of(tree_of(stores, Path("unused"), vectors, curriculum=[{"targets": None}]))
    assert build_plan(config, open_stores(config)).joined(0) == frozenset()
    use(HiddenMatching)
    assert build_plan(config, open_stores(config)).joined(0) == frozenset({STORE})
    without = workers.config_of(tree_of(stores, Path("unused")))
    with pytest.raises(UserError, match=r"read the stores \['vectors'\].*add the missing ones"):
        build_plan(without, open_stores(without))
