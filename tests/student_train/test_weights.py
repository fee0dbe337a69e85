"""Weights of rows and documents: from figures of a store, of mean 1 over the global batch however it is cut."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from potstill.common.errors import UserError
from potstill.storage import LoadedBatch, StoreReader
from potstill.student_train.config.stages import Objective, Stage
from potstill.student_train.config.weights import WEIGHT_FORMS, Weights
from potstill.student_train.curriculum.step_objective import StepObjective, step_objective
from potstill.student_train.data.batch import MicroBatch, collate
from potstill.student_train.data.unit_sums import NOTHING, total
from potstill.student_train.data.weights import check_weights, token_factors
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.model.student import StudentModel, TrainRequest, build_student
from potstill.student_train.run.loop import step_normalizer
from potstill.student_train.run.metrics import loss_figures
from potstill.student_train.run.step_watch import GlobalSums
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.student_train.test_resume import steps_of

ROWS = [3, 39, 7, 12]  # 39 is the short one
ROW = {"of": "row", "store": "slm", "column": "probability", "form": "beta"}
DOCUMENT = {"of": "document", "store": "slm", "column": "probability", "form": "beta"}


@pytest.fixture(scope="module")
def student(start_weights: Path) -> StudentModel:
    tree = {"run": {"output_dir": "x", "max_steps": 1}, "model": {"path": str(start_weights)}}
    config = workers.config_of({**tree, "data": {"tokens": "x", "global_batch_rows": 1}}).model
    return build_student(config, hf_config(config, vocab_size=tiny.VOCAB), seed=0).double()


def batch_of(stores: dict[str, Path], rows: list[int]) -> LoadedBatch:
    tokens, teacher, slm = (StoreReader(stores[name]) for name in ("tokens", "teacher", "scores"))
    joined = {"teacher": teacher.targets_rows(rows), "slm": slm.scores_rows(rows)}
    return LoadedBatch(0, np.array(rows), tokens.tokens_rows(rows), joined)


def objective_of(weights: dict[str, Any] | None, **stage: Any) -> StepObjective:
    given = {"targets": "teacher", "alpha": 0.6, "weights": weights, **stage}
    return step_objective(Objective(), Stage.model_validate(given), 0.0)


def step_gradient(student: StudentModel, micros: list[MicroBatch], objective: StepObjective) -> Tensor:
    """Of one optimizer step over these micro-batches, by the sums that they told before the forward."""
    weights = objective.weights
    units = total(micro.unit_sums for micro in micros) or NOTHING
    values = [sum(micro.weight_sum for micro in micros), sum(micro.kd_weight_sum or 0.0 for micro in micros)]
    sums = GlobalSums(
        *(torch.tensor(x, dtype=torch.float64) for x in (*values, units.count, units.weight, units.chosen))
    )
    normalizer, scale = step_normalizer(
        sums,
        weighs_kd=weights is not None and weights.applies_to == "kd",
        means_units=weights is not None and weights.mean_over == "units",
    )
    student.zero_grad()
    for micro in micros:
        request = TrainRequest(micro, objective, normalizer.float(), len(micros), kd_scale=scale)
        student(request)[0].backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


FOLDED = ("loss", "accuracy", "exact", "answer_probability")


@pytest.mark.parametrize("form", sorted(WEIGHT_FORMS))
def test_forms_equal_their_formulas(form: str) -> None:
    x, a, b = 0.3, 0.5, 2.0
    wanted = {"identity": x, "power": x**a, "exponential": math.exp(a * x), "beta": x**a * (1 - x) ** b, "band": 0.0}
    weights = Weights(of="row", store="slm", column="mean_loss", form=form, a=a, b=b)
    assert weights.weigh(np.array([x]))[0] == pytest.approx(wanted[form], rel=1e-14)
    if form == "band":
        assert weights.weigh(np.array([0.5, 2.0, 0.499, 2.01])).tolist() == [1.0, 1.0, 0.0, 0.0]


def test_documents_weigh_by_the_mean_of_their_trained_positions(stores) -> None:
    """By slow, plain code; with a mask, and a document that trains nothing."""
    batch = batch_of(stores, ROWS)
    [first, *_] = batch.tokens
    mask = np.ones(len(first.tokens), bool)
    mask[2:8] = False
    mask[int(first.doc_lens[0]) : int(first.doc_lens[:2].sum())] = False
    scores = batch.joined["slm"]
    right = np.append(False, scores[2].label_rank[:-1] == 0)  # of this row only labels that are the most probable token
    rows = [replace(first, mask=mask), batch.tokens[1], replace(batch.tokens[2], mask=right), batch.tokens[3]]
    figures = {
        "loss": lambda own, t: -float(own.label_logprob[t]),
        "entropy": lambda own, t: float(own.entropy[t]),
        "accuracy": lambda own, t: float(own.label_rank[t] == 0),
    }
    for column, figure in figures.items():
        found = token_factors(Weights(of="document", store="slm", column=column), rows, scores)
        wanted: list[float] = []
        for row, own in zip(rows, scores, strict=True):
            start, trained = 0, row.has_target()
            for size in row.doc_lens.tolist():
                places = [t for t in range(start, start + size) if trained[t]]
                mean = sum(figure(own, t) for t in places) / len(places) if places else 0.0
                wanted += [mean] * size
                start += size
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    plain = {**DOCUMENT, "form": "identity"}
    loss, accuracy, exact, answer = (
        token_factors(Weights(**{**plain, "column": name}), rows, scores) for name in FOLDED
    )
    trained = [part.sum() for row in rows for part in np.split(row.has_target(), np.cumsum(row.doc_lens)[:-1])]
    counts = np.repeat(trained, np.concatenate([row.doc_lens for row in rows]))
    known = counts > 0
    np.testing.assert_array_equal(exact, accuracy == 1)
    assert 0 < exact[known].mean() < 1
    np.testing.assert_allclose(answer, np.where(known, np.exp(-loss * counts), 0), rtol=1e-4)
    beta = token_factors(Weights(**DOCUMENT), rows, scores)
    p = np.exp(-loss)
    np.testing.assert_allclose(beta[loss > 0], (p * (1 - p))[loss > 0], rtol=1e-5)


def test_of_a_targets_store_a_row_without_targets_weighs_nothing(stores) -> None:
    batch = batch_of(stores, ROWS)
    weights = Weights(of="row", store="teacher", column="mean_loss")
    known = [replace(row, stats={**row.stats, "num_targets": 3.0}) for row in batch.joined["teacher"]]
    refused = replace(known[1], stats=dict.fromkeys(known[1].stats, 0.0))
    found = token_factors(weights, batch.tokens, [known[0], refused, *known[2:]])
    cuts = np.cumsum([len(row.tokens) for row in batch.tokens])[:-1]
    parts = np.split(found, cuts)
    assert not parts[1].any()
    for part, row in zip((parts[0], *parts[2:]), (known[0], *known[2:]), strict=True):
        np.testing.assert_allclose(part, row.stats["mean_loss"], rtol=1e-6)
    with pytest.raises(UserError, match=r"weights\.store: row 39 is of a source without a store 'teacher'"):
        token_factors(weights, batch.tokens, [known[0], None, *known[2:]])


CASES: dict[str, dict[str, Any]] = {
    "rows": {"weights": ROW},
    "documents": {"weights": DOCUMENT},
    "documents, KD alone": {"weights": {**DOCUMENT, "applies_to": "kd"}},
    "rows, with a store's choice": {"weights": ROW, "tokens": {"policy": "top_loss", "source": "slm", "share": 0.5}},
    "rows, KD alone, with a choice of the student": {
        "weights": {**ROW, "applies_to": "kd"},
        "tokens": {"policy": "top_entropy", "share": 0.5, "floor": 0.1},
    },
    "rows, with a choice of the student": {"weights": ROW, "tokens": {"policy": "top_entropy", "share": 0.4}},
    "documents, KD chosen by the student": {
        "weights": {**DOCUMENT, "applies_to": "kd"},
        "tokens": {"policy": "top_entropy", "share": 0.5, "applies_to": "kd"},
    },
    "documents, KD chosen by a store": {
        "weights": DOCUMENT,
        "tokens": {"policy": "top_loss", "source": "slm", "share": 0.5, "applies_to": "kd"},
    },
    "documents, mean over them": {"weights": {**DOCUMENT, "mean_over": "units"}},
    "documents, mean over them, KD alone": {"weights": {**DOCUMENT, "mean_over": "units", "applies_to": "kd"}},
    "documents, mean over them, with a store's choice": {
        "weights": {**DOCUMENT, "mean_over": "units"},
        "tokens": {"policy": "top_loss", "source": "slm", "share": 0.5},
    },
    "rows, mean over them, with a choice of the student": {
        "weights": {**ROW, "mean_over": "units"},
        "tokens": {"policy": "top_entropy", "share": 0.4},
    },
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_sums_are_known_before_the_forward_and_pieces_make_one_step(stores, student: StudentModel, name: str) -> None:
    objective, batch = objective_of(**CASES[name]), batch_of(stores, ROWS)
    apart, whole = (collate(batch, objective, micro_batch_rows=n, row_length=tiny.ROW_LENGTH) for n in (1, 4))
    for micro in (*apart, *whole):
        hidden = student.hidden_states(micro)
        weights, kd_weights = student.hf.lm_head.choice(hidden, micro, objective)
        assert float(weights.sum()) == pytest.approx(micro.weight_sum, rel=1e-5)
        assert not weights[micro.labels == -100].any()
        assert micro.num_active is None or micro.num_active == int((weights != 0).sum())
        if objective.weights is not None and objective.weights.applies_to == "kd":
            assert kd_weights is not None and micro.kd_weight_sum is not None
            if objective.tokens is None or objective.tokens.selector.applies_to == "all":
                assert float((weights * kd_weights).sum()) == pytest.approx(micro.kd_weight_sum, rel=1e-5)
        else:
            assert micro.kd_weight_sum is None
    gradients = [step_gradient(student, micros, objective) for micros in (apart, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)  # weights are float32
    plain = objective_of(None, **{key: value for key, value in CASES[name].items() if key == "tokens"})
    other = step_gradient(student, collate(batch, plain, micro_batch_rows=4, row_length=tiny.ROW_LENGTH), plain)
    assert float((other - gradients[0]).norm() / other.norm()) > 1e-2, "the weights changed nothing"


@pytest.mark.parametrize("applies_to", ["all", "kd"])
def test_only_the_ratio_of_weights_counts(stores, student: StudentModel, applies_to: str) -> None:
    """All rows alike is no weight at all; and a weight of 0 takes a row out of the loss, or out of KD."""
    batch = batch_of(stores, ROWS)
    weights = {"of": "row", "store": "slm", "column": "mean_loss", "applies_to": applies_to}
    scores = batch.joined["slm"]
    alike = replace(batch, joined={**batch.joined, "slm": [replace(row, stats={"mean_loss": 7.0}) for row in scores]})
    objective, plain = objective_of(weights), objective_of(None)

    def gradient(own: LoadedBatch, chosen: StepObjective) -> Tensor:
        return step_gradient(student, collate(own, chosen, micro_batch_rows=2, row_length=tiny.ROW_LENGTH), chosen)

    torch.testing.assert_close(gradient(alike, objective), gradient(batch, plain), rtol=1e-6, atol=1e-9)
    stats = [{"mean_loss": value} for value in (1.0, 1.0, 0.0, 0.0)]
    two = [replace(row, stats=own) for row, own in zip(scores, stats, strict=True)]
    found = gradient(replace(batch, joined={**batch.joined, "slm": two}), objective)
    few = batch_of(stores, ROWS[:2])
    if applies_to == "all":
        torch.testing.assert_close(found, gradient(few, plain), rtol=1e-6, atol=1e-9)
    else:
        assert not torch.allclose(found, gradient(few, plain), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("applies_to", ["all", "kd"])
def test_the_mean_over_documents_counts_each_of_them_once(stores, student: StudentModel, applies_to: str) -> None:
    """By slow, plain code: the same step with each position's weight over the mean of the documents' weights."""
    objective = objective_of({**DOCUMENT, "mean_over": "units", "applies_to": applies_to})
    batch, plain = batch_of(stores, ROWS), objective_of(None)
    found = step_gradient(student, collate(batch, objective, micro_batch_rows=3, row_length=tiny.ROW_LENGTH), objective)
    of_positions, of_documents = [], []
    factors = iter(token_factors(Weights(**DOCUMENT), batch.tokens, batch.joined["slm"]).tolist())
    for row in batch.tokens:
        trained, start = row.has_target(), 0
        for size in row.doc_lens.tolist():
            own = [next(factors) for _ in range(size)]
            of_positions += [w if trained[start + t] else 0.0 for t, w in enumerate(own)]
            of_documents += own[:1] if trained[start : start + size].any() else []
            start += size
    [micro] = collate(batch, plain, micro_batch_rows=4, row_length=tiny.ROW_LENGTH)
    weights = torch.tensor(of_positions) / (sum(of_documents) / len(of_documents))
    if applies_to == "all":
        given = replace(micro, token_weights=weights, num_active=None)
    else:
        given = replace(micro, kd_weights=weights)
    student.zero_grad()
    student(TrainRequest(given, plain, torch.tensor(micro.weight_sum), 1))[0].backward()
    wanted = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)
    over_positions = objective_of({**DOCUMENT, "applies_to": applies_to})
    micros = collate(batch, over_positions, micro_batch_rows=3, row_length=tiny.ROW_LENGTH)
    other = step_gradient(student, micros, over_positions)
    assert float((other - found).norm() / found.norm()) > 1e-3, "short documents weigh as long ones do"


def test_the_mean_over_documents_is_that_of_all_ranks(stores, tmp_path: Path) -> None:
    weights = {**DOCUMENT, "mean_over": "units"}
    for name, world, micro in (("one", 1, 2), ("two", 2, 1)):
        tree = tiny.config_tree(stores, tmp_path / name, curriculum=[{"targets": "teacher", "weights": weights}])
        tree["data"] |= {"micro_batch_rows": micro, "heldout": None, "heldout_targets": None}
        tree["run"]["max_steps"] = 4
        run_ranks(workers.train_run, tree, world=world)
    (one, rows), (two, same_rows) = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
    assert rows == same_rows and two == pytest.approx(one, rel=1e-5)


def test_a_weight_too_small_to_be_multiplied_is_none(stores, student: StudentModel) -> None:
    """Else a row that weighs 1e-44 is counted before the forward, and its product with a floor is 0 behind it."""
    weights = {"of": "row", "store": "slm", "column": "mean_loss", "form": "exponential", "a": -1.0}
    objective = objective_of(weights, tokens={"policy": "top_entropy", "share": 0.5, "floor": 0.1})
    batch = batch_of(stores, ROWS)
    stats = [{"mean_loss": value} for value in (1.0, 2.0, 101.5, 80.0)]
    rows = [replace(row, stats=own) for row, own in zip(batch.joined["slm"], stats, strict=True)]
    batch = replace(batch, joined={**batch.joined, "slm": rows})
    [micro] = collate(batch, objective, micro_batch_rows=4, row_length=tiny.ROW_LENGTH)
    found, _ = student.hf.lm_head.choice(student.hidden_states(micro), micro, objective)
    assert micro.num_active == int((found != 0).sum()) == int((micro.labels[micro.row < 2] != -100).sum())


def test_the_effective_number_of_positions_follows_the_weights(stores, student: StudentModel) -> None:
    objective, batch = objective_of(DOCUMENT), batch_of(stores, ROWS)
    [micro] = collate(batch, objective, micro_batch_rows=4, row_length=tiny.ROW_LENGTH)
    _, sums = student(TrainRequest(micro, objective, torch.tensor(1.0), 1))
    figures = loss_figures(dict(zip(student.sum_names, sums.tolist(), strict=True)))
    assert micro.token_weights is not None
    weights = micro.token_weights.double()
    wanted = float(weights.sum() ** 2 / weights.square().sum())
    assert figures["effective_positions"] == pytest.approx(wanted, rel=1e-5)
    assert wanted < micro.num_active


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"column": "loss"}, "curriculum.0.weights.column: store 'slm' has no row statistic 'loss'"),
        ({"column": "mean_loss"}, "curriculum.0.weights.column: mean_loss of store 'slm' is .* form beta takes"),
        ({"column": "mean_loss", "form": "power", "a": 400.0}, "makes the weight"),
    ],
)
def test_statistics_that_make_no_weight_are_refused_before_a_model(stores, tmp_path, change, message) -> None:
    from potstill.student_train.run.preflight import check_run

    tree = tiny.config_tree(stores, tmp_path, curriculum=[{"targets": "teacher", "weights": {**ROW, **change}}])
    with pytest.raises(UserError, match=message):
        check_run(workers.config_of(tree), world_size=1)
    if change == {"column": "loss"}:
        tree["curriculum"][0]["weights"] = {**ROW, "store": "elsewhere"}
        with pytest.raises(UserError, match=r"curriculum\.0\.weights\.store names store 'elsewhere'"):
            workers.config_of(tree)


def test_negative_infinite_and_missing_figures_are_named(stores) -> None:
    class Made:
        """A store of two rows with these statistics."""

        def __init__(self, *values: float) -> None:
            self.row_stats = {"gain": np.array(values, np.float32)}
            self.num_rows, self.index_digest, self.shared_by = len(values), None, None

    weights = Weights(of="row", store="slm", column="gain")
    for value in (-0.5, math.nan, math.inf):
        with pytest.raises(UserError, match=rf"key\.column: gain of store 'slm' is {value} at number 1"):
            check_weights(weights, Made(1.0, value), key="key")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="every row of store 'slm' weighs 0"):
        check_weights(weights, Made(0.0, 0.0), key="key")  # type: ignore[arg-type]
    batch = batch_of(stores, ROWS)
    bare = StoreReader(stores["teacher"], skip={"label"})
    with pytest.raises(UserError, match="does not hold"):
        check_weights(Weights(of="document", store="teacher", column="loss"), bare, key="key")
    check_weights(Weights(of="document", store="slm", column="loss"), StoreReader(stores["scores"]), key="key")
    assert batch.tokens


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"weights": {**DOCUMENT, "column": "mean_loss"}},
            "of a document there are accuracy, answer_prob",
        ),
        ({"weights": {**ROW, "form": "beat"}}, "beta"),
        ({"weights": {**ROW, "form": "band"}}, "band with a 1, b 1; expected a below b"),
        ({"weights": {**ROW, "b": -1.0}}, "expected both >= 0"),
        ({"weights": {**DOCUMENT, "form": "power", "a": -1.0}}, "a figure may be 0"),
        ({"weights": {**DOCUMENT, "column": "loss"}}, r"form beta takes numbers in \[0, 1\], but the loss"),
        ({"weights": {**DOCUMENT, "column": "entropy", "form": "power", "a": 4.0}}, "use a <= 3.74"),
        ({"weights": {**ROW, "applies_to": "kd"}, "targets": None}, "no effect in a stage without targets"),
        ({"weights": DOCUMENT, "tokens": {"policy": "top_loss", "share": 0.5}}, "unknown before the forward pass"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(stage: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Stage.model_validate({"targets": "teacher", **stage})
