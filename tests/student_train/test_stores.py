"""Stores that do not fit the run are refused before a model is built, with key, found, expected and what to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.common.errors import ConfigError, UserError
from potstill.storage import Loader, SparseTargets, StoreReader, StoreWriter, TargetsRow, TokensRow, seal_store
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.data.batch import collate
from potstill.student_train.data.stores import build_plan, check_objectives, open_stores
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.run.engine import accumulation_steps, world_from_environment
from potstill.student_train.run.run_folder import prepare_run_folder
from tests.storage.stores import kept_only
from tests.student_train import tiny, workers

TEACHER_SIDE = {"temperature_side": "teacher"}


def check(config: TrainConfig) -> None:
    opened = open_stores(config)
    check_objectives(config, opened)
    build_plan(config, opened)
    hf_config(config.model, vocab_size=opened.tokens.spec.vocab_size)


def refused(stores: dict[str, Path], **changes: Any) -> str:
    config = workers.config_of(tiny.config_tree(stores, Path("run"), **changes))
    with pytest.raises(UserError) as error:
        check(config)
    return str(error.value)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stores of another text."""
    return tiny.write_all(tmp_path_factory.mktemp("other"), num_rows=40, last_length=19)


def test_a_store_of_another_text(stores, other) -> None:
    message = refused({**stores, "teacher": other["teacher"]})
    assert "data.targets.teacher" in message and "input_digest" in message and "dump or score" in message
    assert "data.scores.slm" in refused({**stores, "scores": other["scores"]})
    assert "data.heldout_targets" in refused({**stores, "heldout_teacher": stores["teacher"]})


def test_a_store_of_the_wrong_kind_or_none_at_all(stores, tmp_path: Path) -> None:
    message = refused({**stores, "teacher": stores["scores"]})
    assert "data.targets.teacher" in message and "scores store" in message and "targets" in message
    assert "data.tokens" in refused({**stores, "tokens": tmp_path / "nowhere"})


def test_targets_that_stand_one_token_off(stores, tmp_path: Path) -> None:
    """A dump that is shifted trains without an error and teaches the wrong thing: it must not get that far."""
    spec, table = StoreReader(stores["teacher"]).spec, tiny.transition()
    tokens = StoreReader(stores["tokens"])
    rows = [
        tiny.targets_row(row, table, temperatures=spec.temperatures)
        for row in tokens.rows(range(tokens.num_rows))
        if isinstance(row, TokensRow)
    ]
    for number, row in enumerate(rows):
        filled = np.flatnonzero(np.diff(row.targets.offsets))
        assert row.targets.label_logprob is not None
        labels = row.targets.label_logprob.copy()
        labels[filled] = np.roll(labels[filled], 1)
        rows[number] = replace(row, targets=replace(row.targets, label_logprob=labels))
    writer = StoreWriter.create(tmp_path / "shifted", spec)
    for unit in writer.todo():
        writer.commit_unit(unit, [rows[number] for number in writer.unit_rows(unit)])
    seal_store(tmp_path / "shifted")
    message = refused({**stores, "teacher": tmp_path / "shifted"})
    assert "data.targets.teacher" in message and "shifted or belong to other tokens" in message


def test_columns_that_no_stage_looks_at_are_left_alone(stores) -> None:
    def first(**stage: Any) -> SparseTargets:
        tree = tiny.config_tree(stores, Path("run"), curriculum=[{"targets": "teacher", **stage}])
        row = open_stores(workers.config_of(tree)).joined["teacher"].row(0)
        assert isinstance(row, TargetsRow)
        return row.targets

    plain = first()
    assert plain.entropy is None and plain.label_rank is None and not plain.log_tail_at
    assert plain.label_logprob is not None, "by it every row is seen to stand at its tokens"
    assert 2.0 in first(temperature=2.0).log_tail_at
    chosen = first(tokens={"policy": "label_rank", "source": "teacher", "max_rank": 4})
    assert chosen.label_rank is not None
    np.testing.assert_array_equal(chosen.ids, plain.ids)


def test_an_unsealed_store(stores, tmp_path: Path) -> None:
    StoreWriter.create(tmp_path / "open", tiny.spec_of("tokens", num_rows=None))
    message = refused({**stores, "tokens": tmp_path / "open"})
    assert "data.tokens" in message and "seal" in message


def test_a_held_out_store_of_another_tokenizer(stores, tmp_path: Path) -> None:
    rows = tiny.token_rows(4)
    tiny.write_store(tmp_path / "heldout", tiny.spec_of("tokens", num_rows=None, tokenizer_digest="b" * 64), rows)
    message = refused({**stores, "heldout": tmp_path / "heldout"})
    assert "data.heldout" in message and "tokenizer_digest" in message


def test_a_student_with_too_small_a_vocabulary(stores) -> None:
    message = refused(stores, model={"config": {**tiny.STUDENT, "vocab_size": tiny.VOCAB - 1}})
    assert "47" in message and "48" in message and "vocab_size" in message


def test_a_student_that_is_not_there(stores, tmp_path: Path) -> None:
    assert "model.config" in refused(stores, model={"config": str(tmp_path / "none")})
    assert "model_type" in refused(stores, model={"config": {"hidden_size": 8}})
    assert "lama" in refused(stores, model={"config": {"model_type": "lama"}})


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"temperature": 3.0}, ("curriculum.0.temperature", "3.0", "1.0, 1.33")),
        ({"temperature": {"kind": "linear", "start": 1.0, "end": 2.0}}, ("curriculum.0.temperature", "schedule")),
        # The teacher alone: the tails that are needed are the same.
        ({**TEACHER_SIDE, "temperature": 3.0}, ("curriculum.0.temperature", "3.0", "1.0, 1.33", "'teacher'")),
        ({**TEACHER_SIDE, "temperature": 1e-20}, ("curriculum.0.temperature", "1e-20", "renorm")),
        ({**TEACHER_SIDE, "temperature": 3.0, "missing_mass": "label"}, ("curriculum.0.temperature", "3.0")),
        (
            {**TEACHER_SIDE, "temperature": 1e-20, "missing_mass": "renorm", "divergence": "mse_logprobs"},
            ("curriculum.0", "1e-20", "mse_logprobs", "at least 0.01"),
        ),
        (
            {"temperature": 1e-20, "missing_mass": "renorm"},
            ("curriculum.0", "1e-20 on both sides", "temperature_side='teacher'"),
        ),
        ({"divergence": "sampled"}, ("curriculum.0.divergence", "top_k", "sampled")),
        ({"divergence": "reverse_kl", "missing_mass": "raw"}, ("curriculum.0", "reverse_kl", "raw")),
        ({"divergence": "jsd", "options": {"skew": 0.1}}, ("curriculum.0", "'skew'", "'jsd' knows ['beta']")),
    ],
)
def test_losses_that_the_store_cannot_serve(stores, stage: dict[str, Any], words: tuple[str, ...]) -> None:
    message = refused(stores, curriculum=[{"targets": "teacher", **stage}])
    assert all(word in message for word in words), message


def masked_corpus(stores: dict[str, Path], folder: Path) -> StoreReader:
    """The tokens of `stores` with the first half of every row not trained on."""
    spec = replace(StoreReader(stores["tokens"]).spec, columns=("mask",))
    rows = StoreReader(stores["tokens"]).tokens_rows(range(40))
    halves = [replace(row, mask=np.arange(len(row.tokens)) >= len(row.tokens) // 2) for row in rows]
    return tiny.write_store(folder / "masked", spec, halves)


@pytest.mark.parametrize("name", ["teacher", "sampled"])
def test_targets_of_tokens_that_are_not_trained_on(stores, tmp_path: Path, name: str) -> None:
    tokens, spec, table = masked_corpus(stores, tmp_path), StoreReader(stores[name]).spec, tiny.transition()
    rows = [
        tiny.sampled_row(row, table, num_draws=20)
        if name == "sampled"
        else tiny.targets_row(row, table, temperatures=spec.temperatures)
        for row in (replace(row, mask=None) for row in tokens.tokens_rows(range(40)))  # a writer that sees no masks
    ]
    tiny.write_store(tmp_path / "blind", replace(spec, input_digest=tokens.digest), rows)
    data = {"tokens": tokens.url, "targets": {"teacher": str(tmp_path / "blind")}, "scores": {}}
    message = refused(stores, data=data)
    assert "data.targets.teacher: " in message and "row 0, position 0 holds a target of " in message
    assert "token 1 is not trained on (its mask is off)" in message and "dump it again" in message


def test_a_store_whose_tail_is_unknown(stores, tmp_path: Path) -> None:
    spec = replace(StoreReader(stores["teacher"]).spec, normaliser="kept", temperatures=(), stats=())
    rows = []
    for row in StoreReader(stores["tokens"]).tokens_rows(range(40)):
        made = tiny.targets_row(row, tiny.transition(), temperatures=())
        rows.append(replace(made, targets=kept_only(made.targets), stats={}))
    tiny.write_store(tmp_path / "kept", spec, rows)
    data = {"targets": {"teacher": str(tmp_path / "kept")}}
    for mode in ("tail", "label", "raw"):
        message = refused(stores, data=data, curriculum=[{"targets": "teacher", "missing_mass": mode}])
        assert f"curriculum.0.missing_mass is {mode}" in message and "(normaliser kept)" in message
        assert "use missing_mass renorm or support" in message
    message = refused(stores, data=data, curriculum=[{"targets": "teacher"}], objective={"missing_mass": "tail"})
    assert message.startswith("objective.missing_mass is tail")
    for mode in ("renorm", "support"):
        stage = {"targets": "teacher", "missing_mass": mode, "temperature": 2.0}
        check(workers.config_of(tiny.config_tree(stores, Path("run"), data=data, curriculum=[stage])))


@pytest.fixture(scope="module")
def without_entropy(stores, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The teacher's store as an engine leaves it that sees log-probabilities alone."""
    first = StoreReader(stores["teacher"])
    spec = replace(first.spec, temperatures=(), stats=("mean_loss",), info={"lost": ["the entropy"]})
    rows = []
    for row in StoreReader(stores["tokens"]).tokens_rows(range(first.num_rows)):
        made = tiny.targets_row(row, tiny.transition(), temperatures=())
        columns = SparseTargets(offsets=made.targets.offsets, columns=made.targets.columns, entropy=None)
        rows.append(replace(made, targets=columns, stats={"mean_loss": made.stats["mean_loss"]}))
    path = tiny.write_store(tmp_path_factory.mktemp("told") / "targets", spec, rows).url
    return {"targets": {"teacher": path}}


@pytest.mark.parametrize("policy", ["top_entropy", "skip_low_entropy", "entropy_band"])
def test_token_policies_by_an_entropy_that_is_not_stored(stores, without_entropy: dict[str, Any], policy: str) -> None:
    options = {"low": 0.5} if policy == "entropy_band" else {"share": 0.5}
    tokens = {"policy": policy, "source": "teacher", **options}
    message = refused(stores, data=without_entropy, curriculum=[{"targets": "teacher", "tokens": tokens}])
    assert f"store 'teacher', but policy {policy} needs ['entropy'] of it, which it does not hold" in message


def test_rows_and_weights_by_an_entropy_that_is_not_stored(stores, without_entropy: dict[str, Any]) -> None:
    rows = {"score": {"of": [{"store": "teacher", "stat": "mean_entropy"}]}, "share": 0.5}
    message = refused(stores, data=without_entropy, curriculum=[{"targets": "teacher", "rows": rows}])
    assert "store 'teacher' has no row statistic 'mean_entropy'; it has ['mean_loss']" in message
    weights = {"of": "document", "store": "teacher", "column": "entropy", "form": "exponential", "a": -0.1}
    message = refused(stores, data=without_entropy, curriculum=[{"targets": "teacher", "weights": weights}])
    assert "weights.column: entropy of a document needs the entropy of its labels, which store " in message
    weights |= {"of": "row", "column": "mean_entropy"}
    message = refused(stores, data=without_entropy, curriculum=[{"targets": "teacher", "weights": weights}])
    assert "weights.column: store 'teacher' has no row statistic 'mean_entropy'" in message


def test_what_needs_no_entropy_reads_such_a_store_as_any_other(stores, without_entropy: dict[str, Any]) -> None:
    stage = {"targets": "teacher", "tokens": {"policy": "top_loss", "source": "teacher", "share": 0.5}}
    found = []
    for data in ({}, without_entropy):
        config = workers.config_of(tiny.config_tree(stores, Path("run"), data=data, curriculum=[stage]))
        check(config)
        opened = open_stores(config)
        plan = build_plan(config, opened)
        with Loader(plan, opened.tokens, dict(opened.joined)) as loader:
            micros = collate(next(loader), plan.objective(0), micro_batch_rows=2, row_length=tiny.ROW_LENGTH)
        found.append(micros)
    for whole, told in zip(*found, strict=True):
        assert told.weight_sum == whole.weight_sum and torch.equal(told.token_weights, whole.token_weights)
        for name in ("ids", "logprobs", "log_tail"):
            assert torch.equal(told.targets.columns[name], whole.targets.columns[name])


def test_draws_need_the_loss_of_draws(stores) -> None:
    data = {"targets": {"teacher": str(stores["sampled"])}}
    assert "selection sample" in refused(stores, data=data, curriculum=[{"targets": "teacher"}])


@pytest.mark.parametrize("side", ["both", "teacher"])
@pytest.mark.parametrize("missing_mass", ["tail", "renorm", "raw"])
def test_draws_hold_at_temperature_one(stores, missing_mass: str, side: str) -> None:
    data = {"targets": {"teacher": str(stores["sampled"])}}
    stage = {"targets": "teacher", "divergence": "sampled", "missing_mass": missing_mass, "temperature": 2.0}
    stage["temperature_side"] = side
    message = refused(stores, data=data, curriculum=[stage])
    assert "curriculum.0: temperature is 2.0 with divergence 'sampled': draws hold at T = 1 only" in message


def test_a_temperature_schedule_is_fine_where_no_tail_is_read(stores) -> None:
    stage = {
        "targets": "teacher",
        "temperature": {"kind": "linear", "start": 1.0, "end": 2.0},
        "missing_mass": "renorm",
    }
    config = workers.config_of(tiny.config_tree(stores, Path("run"), curriculum=[stage]))
    check_objectives(config, open_stores(config))


@pytest.mark.parametrize("missing_mass", ["renorm", "support"])
def test_argmax_labels_need_no_stored_temperature(stores, missing_mass: str) -> None:
    stage = {**TEACHER_SIDE, "targets": "teacher", "temperature": 1e-20, "missing_mass": missing_mass}
    check(workers.config_of(tiny.config_tree(stores, Path("run"), curriculum=[stage])))


def test_the_tails_of_a_teacher_that_alone_is_tempered_are_read(stores) -> None:
    stage = {**TEACHER_SIDE, "targets": "teacher", "temperature": 2.0}
    config = workers.config_of(tiny.config_tree(stores, Path("run"), curriculum=[stage]))
    check(config)
    row = open_stores(config).joined["teacher"].row(0)
    assert isinstance(row, TargetsRow) and 2.0 in row.targets.log_tail_at


def test_a_statistic_that_is_not_stored(stores) -> None:
    rows = {"score": {"of": [{"store": "slm", "stat": "hardness"}]}, "share": 0.5}
    message = refused(stores, curriculum=[{"rows": rows}])
    assert "hardness" in message and "salt_median_drop" in message


def test_a_global_batch_that_does_not_divide(stores) -> None:
    config = workers.config_of(tiny.config_tree(stores, Path("run"), data={"global_batch_rows": 6}))
    assert accumulation_steps(config, 3) == 1
    with pytest.raises(ConfigError, match=r"data\.global_batch_rows 6 .* 2 x 2 ranks = 4"):
        accumulation_steps(config, 2)


def test_half_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert world_from_environment() == (0, 1)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="WORLD_SIZE, MASTER_ADDR, MASTER_PORT"):
        world_from_environment()


def test_nothing_that_exists_is_overwritten(stores, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for force in (False, True):
        config = workers.config_of(tiny.config_tree(stores, tmp_path, run={"force": force}))
        with pytest.raises(UserError, match="holds other files and no run"):
            prepare_run_folder(config)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="is a file"):
        prepare_run_folder(workers.config_of(tiny.config_tree(stores, tmp_path / "notes.txt")))
