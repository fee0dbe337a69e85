"""Targets of another program, from the command that takes them in to a student that trains on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from potstill.common.config import build_config
from potstill.common.errors import UserError
from potstill.launch.cli import main
from potstill.storage import StoreReader
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.data.stores import check_objectives, open_stores
from potstill.student_train.run.metrics import read_metrics
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.teacher_dump.foreign_files import truth_of, write_distillkit, write_topk


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.write_all(tmp_path_factory.mktemp("stores"))


def test_a_student_trains_on_imported_targets(
    stores: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = StoreReader(stores["tokens"])
    source = write_distillkit(tmp_path / "in", [truth_of(row) for row in tokens.tokens_rows(range(tokens.num_rows))])
    words = ["import", "targets", "--input", str(source), "--output", str(tmp_path), "--tokens", str(stores["tokens"])]
    assert main([*words, "--teacher", "bigram"]) == 0
    assert "targets: 40 rows" in capsys.readouterr().out
    imported, dumped = StoreReader(tmp_path / "targets"), StoreReader(stores["teacher"])
    for mine, theirs in zip(imported.targets_rows(range(40)), dumped.targets_rows(range(40)), strict=True):
        assert mine.token_digest == theirs.token_digest
        assert np.array_equal(mine.targets.offsets, theirs.targets.offsets)
        assert np.array_equal(mine.targets.ids, theirs.targets.ids)
        np.testing.assert_allclose(mine.targets.logprobs, theirs.targets.logprobs, atol=1 / 16)
        np.testing.assert_allclose(mine.targets.log_tail, theirs.targets.log_tail, atol=1 / 16)
    train_two_steps(stores, tmp_path)


def train_two_steps(stores: dict[str, Path], folder: Path, **objective: str) -> None:
    tree = tiny.config_tree(
        stores | {"teacher": folder / "targets"},
        folder / "run",
        run={"max_steps": 2},
        schedule={"warmup": 1, "decay": 1},
        logging={"every_steps": 1},
        objective=objective,
    )
    [summary] = run_ranks(workers.train_run, tree, world=1)
    assert summary["steps"] == 2
    losses = [record["kd"] for record in read_metrics(folder / "run") if record["kind"] == "train"]
    assert len(losses) == 2 and np.isfinite(losses).all() and min(losses) > 0


def test_targets_without_a_tail_need_a_loss_without_one(stores: dict[str, Path], tmp_path: Path) -> None:
    tokens = StoreReader(stores["tokens"])
    truths = [truth_of(row) for row in tokens.tokens_rows(range(tokens.num_rows))]
    logits = [(one.logprobs + 3).tolist() for one in truths]
    source = write_topk(tmp_path / "in" / "a.parquet", truths, topk_logprobs=[], topk_logits=logits)
    words = ["import", "targets", "--input", str(source), "--output", str(tmp_path), "--tokens", str(stores["tokens"])]
    assert main([*words, "--teacher", "bigram"]) == 0
    config = build_config(
        TrainConfig, tiny.config_tree(stores | {"teacher": tmp_path / "targets"}, tmp_path / "run"), source="test"
    )
    with pytest.raises(UserError, match=r"needs the mass outside of the kept entries.*normaliser kept"):
        check_objectives(config, open_stores(config))
    train_two_steps(stores, tmp_path, missing_mass="renorm")
