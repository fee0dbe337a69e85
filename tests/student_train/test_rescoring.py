"""Rows and documents scored by the student in training: by hand, at any number of ranks, and behind a resume."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.storage import StoreReader
from potstill.student_train.curriculum.live_scores import LiveScores
from potstill.student_train.curriculum.plan import rows_digest
from potstill.student_train.data.stores import build_plan, open_stores
from potstill.student_train.evaluation.written_answers import answers_of
from potstill.student_train.run.checkpoint import checkpoint_folder, list_checkpoints, remove_checkpoint
from potstill.student_train.run.metrics import read_metrics
from potstill.student_train.run.rescoring import FILE
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers

CPU = torch.device("cpu")
STEPS, EVERY, NUM_ROWS = 12, 4, 24
BY_ANSWER = {"of": "document", "store": "current", "column": "answer_probability", "form": "power", "a": 0.5}
BY_LOSS = {"score": {"of": [{"store": "current"}]}, "share": 0.5}


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokens whose documents end in an answer of 1 or 2 tokens, but for the last of each row, and targets over them."""
    folder = tmp_path_factory.mktemp("masked")
    rows = []
    for row in tiny.token_rows(NUM_ROWS, seed=4):
        mask = np.zeros(len(row.tokens), bool)
        for number, end in enumerate(np.cumsum(row.doc_lens)[:-1]):
            mask[end - 1 - number : end] = True
        rows.append(replace(row, mask=mask))
    tokens = tiny.write_store(folder / "tokens", tiny.spec_of("tokens", num_rows=None, columns=("mask",)), rows)
    tiny.write_targets(folder / "teacher", tokens, rows, tiny.transition())
    return {name: folder / name for name in ("tokens", "teacher")}


def tree_of(masked: dict[str, Path], output: Path, **changes: Any) -> dict[str, Any]:
    """A run that ranks rows by their loss for two thirds, then weighs documents by the chance of their answer."""
    curriculum = [
        {"until": 8, "targets": "teacher", "rows": {**BY_LOSS, "segments": 2}},
        {"targets": "teacher", "weights": BY_ANSWER},
    ]
    data = {"tokens": str(masked["tokens"]), "targets": {"teacher": str(masked["teacher"])}}
    tree: dict[str, Any] = {
        "run": {"output_dir": str(output), "seed": 3, "max_steps": STEPS, "num_threads": 1},
        "model": {"config": dict(tiny.STUDENT)},
        "data": {**data, "global_batch_rows": 4, "micro_batch_rows": 2},
        "curriculum": curriculum,
        "optimizer": {"lr": 3e-3},
        "rescoring": {"every_steps": EVERY, "rows": "all", "batch_rows": 5},
        "checkpoint": {"every_steps": 2, "keep_last": 9},
        "zero_stage": 1,
    }
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return tree


def told(run: Path) -> tuple[list[float], list[str], list[dict[str, Any]]]:
    """Loss and row digest of each step of a run, and its lines of rescoring without times."""
    records = read_metrics(run)
    train = [record for record in records if record["kind"] == "train"]
    scored = [record for record in records if record["kind"] == "rescoring"]
    return (
        [loss for record in train for loss in record["step_losses"]],
        [digest for record in train for digest in record["row_digests"]],
        [{key: value for key, value in record.items() if "seconds" not in key} for record in scored],
    )


def scores_at(run: Path, step: int) -> LiveScores:
    """The scores in the checkpoint behind `step` steps."""
    folder = checkpoint_folder(run, step)
    [checkpoint] = [found for found in list_checkpoints(run) if found.folder == folder]
    saved = checkpoint.manifest["decisions"]["rescoring"]
    return LiveScores.read(folder / FILE, name="current", step=saved["step"], sha256=saved["sha256"])


@pytest.fixture(scope="module")
def whole(masked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped, on one rank."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_ranks(workers.train_run, tree_of(masked, run), world=1)
    return run


def test_rows_are_ranked_by_the_scores_of_their_step(masked, whole: Path, tmp_path: Path) -> None:
    losses, digests, lines = told(whole)
    assert len(losses) == STEPS
    assert [line["step"] for line in lines] == [0, 4, 8]
    num_answers = len(answers_of(StoreReader(masked["tokens"]).tokens_rows(range(NUM_ROWS))))
    assert all(line["rows"] == NUM_ROWS and line["documents"] == num_answers for line in lines)
    assert lines[0]["means"]["loss"] > lines[1]["means"]["loss"] > lines[2]["means"]["loss"]
    assert all(sum(counts) == num_answers for line in lines for counts in line["histograms"].values())
    config = workers.config_of(tree_of(masked, tmp_path / "other"))
    plain = build_plan(config, open_stores(config))
    pools = []
    for step in (2, 4):  # the checkpoint of step 4 holds what the steps from 4 on are trained by
        scores = scores_at(whole, step)
        assert scores.step == step // EVERY * EVERY
        mean_loss = scores.sums["loss"].reshape(NUM_ROWS, 3).sum(1) / scores.count.reshape(NUM_ROWS, 3).sum(1)
        pools.append(np.sort(np.argsort(-mean_loss, kind="stable")[: NUM_ROWS // 2]))
        plan = plain.with_scores(scores)
        drawn = np.concatenate([plan.rows(scores.step + number) for number in range(3)])
        assert sorted(drawn) == pools[-1].tolist(), "a pool of 12 rows is drawn once in three batches of 4"
        for number in range(scores.step, scores.step + EVERY):
            assert digests[number] == rows_digest(plan.rows(number))
    assert (pools[0] != pools[1]).any()
    assert pools[0].tolist() != list(range(NUM_ROWS // 2)), "the order before the first scoring"


def cut_back(run: Path, to: Path, step: int) -> Path:
    """A copy of a run as it was left right behind the checkpoint of `step`."""
    shutil.copytree(run, to)
    for checkpoint in list_checkpoints(to):
        if checkpoint.step > step:
            remove_checkpoint(checkpoint.folder)
    return to


@pytest.mark.parametrize(("step", "world"), [(6, 1), (8, 2)])
def test_a_resumed_run_trains_as_if_not_stopped(masked, whole: Path, tmp_path: Path, step: int, world: int) -> None:
    """Between two scorings with the saved scores, and behind the last one on other ranks."""
    run = cut_back(whole, tmp_path / "run", step)
    run_ranks(workers.train_run, tree_of(masked, run), world=world)
    losses, digests, lines = told(run)
    wanted_losses, wanted_digests, wanted_lines = told(whole)
    assert digests == wanted_digests
    assert losses == (wanted_losses if world == 1 else pytest.approx(wanted_losses, rel=1e-5))
    assert lines == wanted_lines


def test_two_ranks_under_zero_3_score_and_draw_as_one_does(masked, tmp_path: Path) -> None:
    options = {
        "rescoring": {"measure": "generated", "rows": "upcoming", "generated": {"per_prompt": 3}},
        "curriculum": [
            {"targets": "teacher", "weights": {**BY_ANSWER, "column": "pass_rate", "form": "exponential", "a": -1}}
        ],
        "run": {"max_steps": 5},
        "zero_stage": 3,
    }
    found = []
    for world in (1, 2):
        run_ranks(workers.train_run, tree_of(masked, tmp_path / str(world), **options), world=world)
        found.append(told(tmp_path / str(world)))
    one, two = found
    assert one[1] == two[1]
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    assert one[2][0] == two[2][0], "the same weights, and so the same scores to the bit"
    assert [line["rows"] for line in one[2]] == [16, 4], "of the steps 0 to 3, and of the one that is left"
    assert 0 < one[2][0]["means"]["pass_rate"] < 0.5
