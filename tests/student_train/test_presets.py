"""Every preset runs on the tiny stores, does what its paper says, and reads only what it needs."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from potstill.common.config import load_config
from potstill.launch.presets import find_preset, list_presets
from potstill.storage import ScoresRow, StoreReader
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.data.stores import build_plan, open_stores
from potstill.student_train.run.metrics import read_metrics
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers

STORES = {
    "targets": "teacher",
    "targets/step_250": "early_teacher",
    "targets/step_500": "teacher",
    "targets/step_750": "teacher",
    "targets/step_1000": "teacher",
}
NAMES = [preset.name for preset in list_presets()]


def tree_of(name: str, stores: dict[str, Path], run: Path) -> dict[str, Any]:
    """A preset with the tiny stores and student in the place of its own."""
    path = next(preset.path for preset in list_presets() if preset.name == name)
    tree = load_config(TrainConfig, path).model_dump(mode="json")
    data = tree["data"]
    data["tokens"] = str(stores["tokens"])
    data["targets"] = {key: str(stores[STORES[value]]) for key, value in data["targets"].items()}
    own = {"rollouts": "rollouts", "teacher": "teacher_scores"}
    data["scores"] = {key: str(stores[own.get(key, "scores")]) for key in data["scores"]}
    if name == "rs_kd":
        data["targets"] = {"teacher": str(stores["sampled"])}
    data |= {"global_batch_rows": 4, "micro_batch_rows": 2}
    tree["model"] |= {"config": dict(tiny.STUDENT), "path": None}
    tree["run"] |= {"output_dir": str(run), "max_steps": 10, "num_threads": 1}
    tree["logging"]["every_steps"] = 1
    return tree


@pytest.fixture(scope="module")
def stores(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With the teacher's scores, and an initial student's graded answers beside its losses: most have the grade 0."""
    tokens, scores = StoreReader(stores["tokens"]), StoreReader(stores["scores"])
    rows = scores.scores_rows(range(scores.num_rows))
    graded = [replace(row, stats={**row.stats, "mean_greedy_score": float(row.row % 5 == 0)}) for row in rows]
    spec = replace(scores.spec, stats=(*scores.spec.stats, "mean_greedy_score"), input_digest=tokens.digest)
    folder = tmp_path_factory.mktemp("graded")
    tiny.write_store(folder / "rollouts", spec, graded)
    taught = []
    for row in tokens.tokens_rows(range(tokens.num_rows)):
        columns = tiny.side_columns(row, tiny.transition())
        taught.append(ScoresRow(row.row, row.digest(), **columns, stats=tiny.row_statistics(row, columns)))
    tiny.write_store(folder / "teacher", scores.spec, taught)
    return {**stores, "rollouts": folder / "rollouts", "teacher_scores": folder / "teacher"}


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_trains(name: str, stores, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_ranks(workers.train_run, tree_of(name, stores, run), world=1)[0]["status"] == "done"
    records = [record for record in read_metrics(run) if record["kind"] == "train"]
    assert [record["step"] for record in records] == list(range(1, 11))
    stages = [record["stage"] for record in records]
    config = load_config(TrainConfig, run / "config.yaml")
    assert list(dict.fromkeys(stages)) == [stage.name for stage in config.curriculum]
    distils = {stage.name: stage.distils for stage in config.curriculum}
    for record in records:
        if not distils[record["stage"]]:
            assert record["kd"] is None and record["kept_mass"] is None
    check = CHECKS.get(name)
    if check is not None:
        check(records, config)


def _salt(records: list[dict[str, Any]], config: TrainConfig) -> None:
    assert [record["kd"] is not None for record in records] == [True] * 2 + [False] * 8
    _teacher_side(records, config)


def _pocl(records: list[dict[str, Any]], config: TrainConfig) -> None:
    # Stages of 1, 2, 3 and 4 of 10 steps: each begins at the peak, without moments, and then falls.
    assert [stage.restart_optimizer for stage in config.curriculum] == [False, True, True, True]
    lrs = [record["lr"] for record in records]
    peak = config.optimizer.lr
    assert [step for step, lr in enumerate(lrs) if lr == peak] == [0, 1, 3, 6]
    assert lrs[2] < peak and lrs[3] > lrs[4] > lrs[5] and lrs[6] > lrs[7] > lrs[8] > lrs[9] > 0.1 * peak
    assert [record["row_share"] for record in records] == [0.25] + [0.5] * 2 + [0.75] * 3 + [1.0] * 4


def _teacher_side(records: list[dict[str, Any]], config: TrainConfig) -> None:
    assert config.objective.temperature_side == "teacher" and config.objective.temperature == 1.0


def _progressive(records: list[dict[str, Any]], config: TrainConfig) -> None:
    # The names say the teacher's steps; a clock of its own speed would read more than the first in 10 steps.
    [stage] = config.curriculum
    assert stage.targets_clock is not None and stage.targets_clock.wanted_step(999) == 1000
    assert stage.target_names(config.data.targets) == tuple(config.data.targets)
    _teacher_side(records, config)


def _se_kd(records: list[dict[str, Any]], config: TrainConfig) -> None:
    # A fifth of each row's labelled positions, rounded up.
    assert all(0.2 <= record["selected_share"] < 0.26 for record in records)
    assert all(record["flops_saved_share"] > 0 for record in records)


def _tip(records: list[dict[str, Any]], config: TrainConfig) -> None:
    assert all(0.5 <= record["selected_share"] < 0.54 for record in records)


def _skip_easy(records: list[dict[str, Any]], config: TrainConfig) -> None:
    assert all(record["selected_share"] == 1.0 and 0.85 <= record["kd_share"] < 0.89 for record in records)
    for record in records:
        # A tenth of CE everywhere, and the rest of it where KD is off: an eighth of the positions. What is left for
        # these is the CE of what is easy to the teacher; to a student of a few steps they are much as others.
        of_labels = record["loss"] - 0.9 * record["kd"] * record["kd_share"]
        where_off = (of_labels - 0.1 * record["ce"]) / (0.9 * (1.0 - record["kd_share"]))
        assert 0.5 < where_off / record["ce"] < 1.1


def _paced(records: list[dict[str, Any]], config: TrainConfig) -> None:
    # A student that was never trained writes short answers right at best, so few documents count.
    assert all(record["loss"] > 0 for record in records)
    assert all(0 < record["effective_positions"] < 0.2 * 4 * tiny.ROW_LENGTH for record in records)
    assert [stage.divergence for stage in config.curriculum] == ["forward_kl", "reverse_kl"]
    assert {stage.weights.mean_over for stage in config.curriculum} == {"units"}


def _paced_text(records: list[dict[str, Any]], config: TrainConfig) -> None:
    # The weights are of KD alone, and 0 where the student has not one token right: labels count everywhere.
    assert all(record["selected_share"] == 1.0 and record["ce"] > 0 for record in records)
    assert all(record["kd_share"] is None or record["kd_share"] < 1.0 for record in records)


def _distill(records: list[dict[str, Any]], config: TrainConfig) -> None:
    # Positions that the small LM knows at once, then all; floor 1 is reached at the stage's last step.
    assert records[0]["selected_share"] <= 1.0 and records[-1]["selected_share"] == 1.0


def _pd_wsd(records: list[dict[str, Any]], config: TrainConfig) -> None:
    # alpha starts and ends at 0: no target is read at those two steps.
    assert [record["kd"] is None for record in records] == [True] + [False] * 8 + [True]


CHECKS = {
    "salt": _salt,
    "pocl": _pocl,
    "progressive": _progressive,
    "se_kd": _se_kd,
    "tip": _tip,
    "skip_easy": _skip_easy,
    "paced": _paced,
    "paced_text": _paced_text,
    "distill": _distill,
    "pd_wsd": _pd_wsd,
}


def test_the_mse_and_nll_variants_of_pd_by_override(stores, tmp_path: Path) -> None:
    tree = tree_of("pd_wsd", stores, tmp_path / "mse")
    tree["objective"]["divergence"] = "mse_probs"
    assert run_ranks(workers.train_run, tree, world=1)[0]["status"] == "done"


def test_the_argmax_labels_of_progressive_by_override(stores, tmp_path: Path) -> None:
    path = next(preset.path for preset in list_presets() if preset.name == "progressive")
    words = ["objective.temperature=1e-20", "objective.missing_mass=renorm"]
    assert load_config(TrainConfig, path, words).objective.temperature == 1e-20
    tree = tree_of("progressive", stores, tmp_path / "argmax")
    tree["objective"] |= {"temperature": 1e-20, "missing_mass": "renorm"}
    assert run_ranks(workers.train_run, tree, world=1)[0]["status"] == "done"
    records = [record for record in read_metrics(tmp_path / "argmax") if record["kind"] == "train"]
    assert all(record["kept_mass"] == pytest.approx(1.0) and record["kd"] > 0 for record in records)


OFF_KD = {
    "distill": "nothing", "paced": "nothing", "paced_text": "ce", "pd_wsd": "nothing", "pocl": "nothing",
    "progressive": "nothing",
    "pruned": "nothing", "rs_kd": "nothing", "salt": "nothing", "se_kd": "nothing", "skip_easy": "ce", "tip": "nothing",
}  # fmt: skip


def test_each_preset_that_distils_says_what_its_paper_does_where_kd_is_off() -> None:
    said = {}
    for preset in list_presets():
        tree = yaml.safe_load(preset.path.read_text())
        if any({"targets", "targets_clock"} & set(stage) for stage in tree["curriculum"]):
            said[preset.name] = tree["objective"]["off_kd"]
    assert said == OFF_KD


def test_the_second_stage_of_paced_may_be_on_answers_of_the_student(stores, tmp_path: Path) -> None:
    tree = tree_of("paced", stores, tmp_path / "run")
    tree["data"] |= {"tokens": None, "targets": {}}
    tree["data"]["sources"] = {
        "responses": {"tokens": str(stores["tokens"]), "targets": {"teacher": str(stores["teacher"])}},
        "answers": {"tokens": str(stores["heldout"]), "targets": {"teacher": str(stores["heldout_teacher"])}},
    }
    for stage, name in zip(tree["curriculum"], ("responses", "answers"), strict=True):
        stage["mix"] = {name: 1.0}
    assert run_ranks(workers.train_run, tree, world=1)[0]["status"] == "done"
    records = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    read = [[name for name, own in record["sources"].items() if own["rows"]] for record in records]
    assert read == [["responses"]] * 5 + [["answers"]] * 5


def test_pocl_ranks_by_grade_and_loss_alike(stores, tmp_path: Path) -> None:
    """By slow, plain code: rank of the loss, and one rank for all rows of a grade."""
    config = workers.config_of(tree_of("pocl", stores, tmp_path / "run"))
    plan = build_plan(config, open_stores(config))
    stats = StoreReader(stores["rollouts"]).row_stats
    loss, grade = (np.asarray(stats[name], float) for name in ("mean_loss", "mean_greedy_score"))
    fused = []
    for row in range(len(loss)):
        rank_loss = (loss < loss[row]).sum() + 1
        rank_grade = (grade > grade[row]).sum() + ((grade == grade[row]).sum() + 1) / 2
        fused.append(1 / (60 + rank_loss) + 1 / (60 + rank_grade))
    easiest = set(np.argsort(-np.array(fused), kind="stable")[:10].tolist())
    assert set(plan.rows(0).tolist()) <= easiest
    assert plan.segments[0].order.draws[0].pool.tolist() == sorted(easiest)


def test_the_old_name_of_miniplm_is_found_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert find_preset("minillm_plm") == find_preset("miniplm")
    assert [record.getMessage() for record in caplog.records] == [
        "preset minillm_plm is called miniplm now; the old name is still found"
    ]
    assert "minillm_plm" not in NAMES


def test_all_the_presets_of_the_field_are_there() -> None:
    wanted = "lm distill salt pd_wsd pocl progressive paced paced_text rs_kd miniplm skip_easy se_kd tip pruned"
    assert set(wanted.split()) <= set(NAMES)
    for preset in list_presets():
        assert len(preset.path.read_text().splitlines()) <= 80, preset.name
        assert isinstance(yaml.safe_load(preset.path.read_text()), dict)
