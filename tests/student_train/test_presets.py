"""Every preset runs on the tiny stores, does what its paper says, and reads only what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.common.config import load_config
from potstill.launch.presets import list_presets
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.run.metrics import read_metrics
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers

STORES = {
    "targets": "teacher",
    "targets-early": "early_teacher",
    "targets-middle": "teacher",
    "targets-final": "teacher",
}
NAMES = [preset.name for preset in list_presets()]


def tree_of(name: str, stores: dict[str, Path], run: Path) -> dict[str, Any]:
    """A preset with the tiny stores and student in the place of its own."""
    path = next(preset.path for preset in list_presets() if preset.name == name)
    tree = load_config(TrainConfig, path).model_dump(mode="json")
    data = tree["data"]
    data["tokens"] = str(stores["tokens"])
    data["targets"] = {key: str(stores[STORES[value]]) for key, value in data["targets"].items()}
    data["scores"] = {key: str(stores["scores"]) for key in data["scores"]}
    if name == "rs_kd":
        data["targets"] = {"teacher": str(stores["sampled"])}
    data |= {"global_batch_rows": 4, "micro_batch_rows": 2}
    tree["model"] |= {"config": dict(tiny.STUDENT), "path": None}
    tree["run"] |= {"output_dir": str(run), "max_steps": 10, "num_threads": 1}
    tree["logging"]["every_steps"] = 1
    return tree


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_trains(name: str, stores, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_ranks(workers.train_run, tree_of(name, stores, run), world=1)[0]["status"] == "done"
    records = [record for record in read_metrics(run) if record["kind"] == "train"]
    assert [record["step"] for record in records] == list(range(1, 11))
    stages = [record["stage"] for record in records]
    config = load_config(TrainConfig, run / "config.yaml")
    assert list(dict.fromkeys(stages)) == [stage.name for stage in config.curriculum]
    distils = {stage.name: stage.targets is not None for stage in config.curriculum}
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
    # 1, 2, 3 and 4 of 10 steps: a twentieth of them is no step, so that each stage begins at the peak and then falls.
    lrs = [record["lr"] for record in records]
    peak = config.optimizer.lr
    assert [step for step, lr in enumerate(lrs) if lr == peak] == [0, 1, 3, 6]
    assert lrs[2] < peak and lrs[3] > lrs[4] > lrs[5] and lrs[6] > lrs[7] > lrs[8] > lrs[9] > 0.1 * peak


def _teacher_side(records: list[dict[str, Any]], config: TrainConfig) -> None:
    assert config.objective.temperature_side == "teacher" and config.objective.temperature == 1.0


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
    assert all(record["selected_share"] > 0.99 and record["effective_positions"] > 0 for record in records)


def _distill(records: list[dict[str, Any]], config: TrainConfig) -> None:
    # Positions that the small LM knows at once, then all; floor 1 is reached at the stage's last step.
    assert records[0]["selected_share"] <= 1.0 and records[-1]["selected_share"] == 1.0


def _pd_wsd(records: list[dict[str, Any]], config: TrainConfig) -> None:
    # alpha starts and ends at 0: no target is read at those two steps.
    assert [record["kd"] is None for record in records] == [True] + [False] * 8 + [True]


CHECKS = {
    "salt": _salt,
    "pocl": _pocl,
    "progressive": _teacher_side,
    "se_kd": _se_kd,
    "tip": _tip,
    "skip_easy": _skip_easy,
    "paced": _paced,
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
    "distill": "nothing", "paced": "ce", "pd_wsd": "nothing", "pocl": "nothing", "progressive": "nothing",
    "pruned": "nothing", "rs_kd": "nothing", "salt": "nothing", "se_kd": "nothing", "skip_easy": "ce", "tip": "nothing",
}  # fmt: skip


def test_each_preset_that_distils_says_what_its_paper_does_where_kd_is_off() -> None:
    said = {}
    for preset in list_presets():
        tree = yaml.safe_load(preset.path.read_text())
        if any("targets" in stage for stage in tree["curriculum"]):
            said[preset.name] = tree["objective"]["off_kd"]
    assert said == OFF_KD


def test_all_the_presets_of_the_field_are_there() -> None:
    wanted = "lm distill salt pd_wsd pocl progressive paced rs_kd minillm_plm skip_easy se_kd tip pruned"
    assert set(wanted.split()) <= set(NAMES)
    for preset in list_presets():
        assert len(preset.path.read_text().splitlines()) <= 80, preset.name
        assert isinstance(yaml.safe_load(preset.path.read_text()), dict)
