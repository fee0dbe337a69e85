"""The measure of the house: one of each kind is added by one entry in one table, and works from file to effect.

What is added here stands nowhere else. An engine is added in tests/teacher_dump/test_finished_topk.py, a column of
targets in tests/storage/test_columns.py, a loss term in tests/student_train/test_loss_terms.py, a kernel backend in
tests/kernels/test_settings.py, a foreign format of tokens in tests/teacher_dump/test_import_tokens.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import yaml
from pydantic import Field

from potstill.common.config import dump_config, load_config
from potstill.common.errors import ConfigError, UserError
from potstill.common.options import describe_keys, list_keys
from potstill.storage import (
    TOKENS_COLUMNS,
    EpochPlan,
    Loader,
    StoreError,
    StoreReader,
    TokensColumn,
    VersionError,
    store_stats,
    verify_store,
)
from potstill.student_train.config.curves import CURVES, Curve
from potstill.student_train.config.lr_schedule import LR_SHAPES, LrShape
from potstill.student_train.config.optimizers import OPTIMIZERS
from potstill.student_train.config.row_scores import ROW_SCORES, RowScoreKind
from potstill.student_train.config.token_policies import TOKEN_POLICIES, TokenPolicy
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.config.weights import WEIGHT_FORMS, WeightForm
from potstill.student_train.data.batch import collate
from potstill.student_train.data.stores import build_plan, check_objectives, open_stores
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.write_all(tmp_path_factory.mktemp("stores"))


def config_file(stores: dict[str, Path], folder: Path, **changes: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tiny.config_tree(stores, folder / "run", **changes)))
    return path


def read(path: Path, folder: Path) -> TrainConfig:
    """The configuration of a file, after it has been written and read again as a run folder does."""
    config = load_config(TrainConfig, path)
    (folder / "again.yaml").write_text(dump_config(config))
    assert load_config(TrainConfig, folder / "again.yaml") == config
    return config


def help_text() -> str:
    return describe_keys(list_keys(TrainConfig))


def test_a_column_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who speaks: a number per token, which rows may lack; from the writer to the loader, and a reader without it."""
    rows = tiny.token_rows(8)
    turns = {row.row: np.arange(len(row.tokens), dtype=np.uint8) // 5 for row in rows if row.row % 2}
    given = [replace(row, more={"turn": turns[row.row]} if row.row in turns else {}) for row in rows]
    with pytest.raises(StoreError, match=r"columns \('turn',\) must be distinct and among \['mask'\]"):
        tiny.spec_of("tokens", num_rows=None, columns=("turn",))
    entry = TokensColumn(
        name="turn",
        axis="token",
        dtype=np.uint8,
        encode=lambda values: values,
        decode=lambda plane, num_tokens: plane,
        feature="turns",
        implied=lambda values: not values.any(),
    )
    monkeypatch.setitem(TOKENS_COLUMNS, "turn", entry)
    spec = tiny.spec_of("tokens", num_rows=None, columns=("turn", "mask"))
    reader = tiny.write_store(tmp_path / "tokens", spec, given)
    assert reader.spec.required_features == ["planes", "loss_mask", "turns"] and verify_store(reader.url, deep=True).ok
    assert store_stats(reader.url).column_bytes["turn"] > 0
    with Loader(EpochPlan(8, global_batch=8, seed=0, joined=[]), reader, {}) as loader:
        for row in next(loader).tokens:
            found = row.column("turn")
            assert (found is None) == (row.row not in turns)
            assert found is None or np.array_equal(found, turns[row.row])
    monkeypatch.delitem(TOKENS_COLUMNS, "turn")
    with pytest.raises(VersionError, match=r"needs the features \['turns'\], which this reader does not know"):
        StoreReader(reader.url)


def test_a_token_policy(stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tokens that the small model finds easy: those whose loss is least."""
    tokens = {"policy": "easy", "source": "slm", "share": 0.25, "max_rank": 3}
    path = config_file(stores, tmp_path, curriculum=[{"targets": "teacher", "tokens": tokens}])
    with pytest.raises(ConfigError, match=r"curriculum\.0\.tokens\.policy: Input should be 'label_rank'"):
        load_config(TrainConfig, path)
    refusal = "tokens.policy easy is of a small model: name its store in tokens.source"
    entry = TokenPolicy(
        kind="share",
        needs=("loss", "rank"),
        reads=("max_rank",),
        score=lambda columns, *, max_rank: (columns["rank"] < max_rank).float() - columns["loss"],
        check=lambda selector: refusal if selector.source == "student" else None,
    )
    monkeypatch.setitem(TOKEN_POLICIES, "easy", entry)
    assert "random|easy" in help_text()
    with pytest.raises(ConfigError, match=refusal):
        load_config(TrainConfig, path, ["curriculum.0.tokens.source=student"])
    config = read(path, tmp_path)
    opened = open_stores(config)
    plan = build_plan(config, opened)
    assert plan.joined(0) == {"teacher", "slm"}
    with Loader(plan, opened.tokens, dict(opened.joined)) as loader:
        batch = next(iter(loader))
    micros = collate(batch, plan.objective(0), micro_batch_rows=1, row_length=tiny.ROW_LENGTH)
    for micro, row, scores in zip(micros, batch.tokens, batch.joined["slm"], strict=True):
        labelled = np.flatnonzero(tiny.label_mask(row))
        score = (scores.label_rank < 3) + scores.label_logprob  # type: ignore[union-attr]
        best = labelled[np.argsort(-score[labelled], kind="stable")][: int(np.ceil(0.25 * len(labelled)))]
        assert micro.token_weights is not None
        assert np.flatnonzero(micro.token_weights.numpy()).tolist() == sorted(best)
        assert micro.weight_sum == micro.num_active == len(best)


def test_a_form_of_weights(stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A threshold: rows whose small model's loss is above `a` count b times as much."""
    weights = {"of": "row", "store": "slm", "column": "mean_loss", "form": "above", "a": 2.0, "b": 3.0}
    path = config_file(stores, tmp_path, curriculum=[{"targets": "teacher", "weights": weights}])
    with pytest.raises(ConfigError, match=r"curriculum\.0\.weights\.form: Input should be 'identity'"):
        load_config(TrainConfig, path)
    entry = WeightForm(lambda values, a, b: np.where(values > a, b, 1.0), low=0.5)
    monkeypatch.setitem(WEIGHT_FORMS, "above", entry)
    assert "band|above" in help_text()
    config = read(path, tmp_path)
    opened = open_stores(config)
    check_objectives(config, opened)
    plan = build_plan(config, opened)
    assert plan.joined(0) == {"teacher", "slm"}
    with Loader(plan, opened.tokens, dict(opened.joined)) as loader:
        batch = next(iter(loader))
    micros = collate(batch, plan.objective(0), micro_batch_rows=1, row_length=tiny.ROW_LENGTH)
    wanted = [3.0 if row.stats["mean_loss"] > 2.0 else 1.0 for row in batch.joined["slm"] if row is not None]
    for micro, weight in zip(micros, wanted, strict=True):
        assert micro.token_weights is not None and set(micro.token_weights.tolist()) == {0.0, weight}
    monkeypatch.setitem(WEIGHT_FORMS, "above", replace(entry, low=50.0))
    with pytest.raises(UserError, match=r"curriculum\.0\.weights\.column: mean_loss of store 'slm' is .* \[50, inf\]"):
        check_objectives(config, opened)


class Steps(Curve):
    """A staircase, with a top that neither end has."""

    kind: Literal["steps"] = Field(default="steps", description="A staircase")
    levels: tuple[float, ...] = Field(description="Values, each over an equal part of the stage")

    def at(self, x: float) -> float:
        return self.levels[min(int(x * len(self.levels)), len(self.levels) - 1)]

    @property
    def corners(self) -> tuple[float, ...]:
        return self.levels


def test_a_curve(stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = config_file(stores, tmp_path, objective={"alpha": {"kind": "steps", "levels": [0.25, 1.0, 0.0]}})
    with pytest.raises(ConfigError, match=r"objective\.alpha: .*Input tag 'steps' found using 'kind'"):
        load_config(TrainConfig, path)
    monkeypatch.setitem(CURVES, "steps", Steps)
    assert "{kind: steps, levels}" in help_text()
    with pytest.raises(ConfigError, match=r"alpha takes the value 3.0; it must lie in \[0.0, 1.0\]"):
        load_config(TrainConfig, path, ["objective.alpha.levels=[0, 3, 0]"])
    with pytest.raises(ConfigError, match=r"line \d+: objective\.alpha\.level: unknown key; did you mean 'levels'"):
        load_config(TrainConfig, config_file(stores, tmp_path, objective={"alpha": {"kind": "steps", "level": [1]}}))
    path = config_file(stores, tmp_path, objective={"alpha": {"kind": "steps", "levels": [0.25, 1.0, 0.0]}})
    config = read(path, tmp_path)
    plan = build_plan(config, open_stores(config))
    assert [plan.objective(step).settings.alpha for step in range(8)] == [0.25, 0.25, 0.25, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert [plan.joined(step) for step in (0, 7)] == [{"teacher"}, set()], "alpha 0 reads no targets"


def test_a_row_score(stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product of two statistics."""
    of = [{"store": "slm", "stat": "mean_loss"}, {"store": "slm", "stat": "mean_entropy"}]
    rows = {"score": {"kind": "product", "of": of}, "share": 0.3, "segments": 1}
    path = config_file(stores, tmp_path, curriculum=[{"rows": rows}])
    with pytest.raises(ConfigError, match=r"rows\.score\.kind: Input should be 'stat', .* \(found 'product'\)"):
        load_config(TrainConfig, path)
    entry = RowScoreKind((2, 2), lambda columns, score, num_rows, seed: columns[0] * columns[1])
    monkeypatch.setitem(ROW_SCORES, "product", entry)
    assert "stat|difference|rank_fusion|random|product" in help_text()
    with pytest.raises(ConfigError, match=r"rows\.score\.kind product takes 2 to 2 statistics, found 1"):
        load_config(TrainConfig, path, ["curriculum.0.rows.score.of=[{store: slm}]"])
    config = read(path, tmp_path)
    opened = open_stores(config)
    plan = build_plan(config, opened)
    stats = {name: values.astype(np.float64) for name, values in opened.joined["slm"].row_stats.items()}
    wanted = np.argsort(-stats["mean_loss"] * stats["mean_entropy"], kind="stable")[: round(0.3 * 40)]
    taken = np.concatenate([plan.rows(step) for step in range(3)])
    assert sorted(taken.tolist()) == sorted(wanted.tolist())


def test_a_shape_of_the_learning_rate(stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fall with the square of what is left, from the end of the warm-up."""
    path = config_file(stores, tmp_path, schedule={"kind": "square", "warmup": 2, "min_ratio": 0.0})
    with pytest.raises(ConfigError, match=r"schedule\.kind: Input should be 'constant', 'linear', 'cosine' or 'wsd'"):
        load_config(TrainConfig, path)
    entry = LrShape(lambda schedule, total, after: after, lambda schedule: lambda x: (1.0 - x) ** 2)
    monkeypatch.setitem(LR_SHAPES, "square", entry)
    config = read(path, tmp_path)
    plan = build_plan(config, open_stores(config))
    factors = [plan.lr_factor(step) for step in range(8)]
    assert factors == pytest.approx([0.5, 1.0, *(((6 - done) / 6) ** 2 for done in range(6))])


def test_the_tables_cost_a_help_text_nothing() -> None:
    code = (
        "import sys\n"
        "import potstill.student_train.config.train, potstill.teacher_dump.config\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'transformers', 'deepspeed'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr


def test_an_optimizer(stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGD without anything; one run of three steps in a rank, where the entry stands as well."""
    changes = {"optimizer": {"kind": "plain", "lr": 0.5}, "run": {"max_steps": 3}}
    path = config_file(stores, tmp_path, **changes)
    with pytest.raises(ConfigError, match=r"optimizer\.kind: Input should be 'adamw' or 'muon'"):
        load_config(TrainConfig, path)
    [steps] = run_ranks(workers.train_with_plain_sgd, yaml.safe_load(path.read_text()), world=1)
    assert steps == 3
    monkeypatch.setitem(OPTIMIZERS, "plain", lambda student, options, device: None)
    assert read(path, tmp_path).optimizer.kind == "plain"
    assert "plain" in help_text()
