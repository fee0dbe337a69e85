"""The comparison of a preset on one's own stores: which arms it makes, and what it reads from their runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.claims.base import Arm, Bench
from benchmarks.claims.runs import Runs
from benchmarks.methods import PLAIN_KD, arms_of, arms_table, findings_of, main, parse
from potstill.common.config import build_config, load_config
from potstill.common.errors import UserError
from potstill.launch.presets import find_preset, list_presets
from potstill.student_train.config.train import TrainConfig


def words_of(preset: str, *more: str) -> list[str]:
    data = load_config(TrainConfig, find_preset(preset).path, []).data
    stores = [f"--{kind}" for kind in ("targets", "scores") if getattr(data, kind)]
    words = ["--preset", preset, "--tokens", "/stores/tokens", "--heldout", "/stores/heldout", "--steps", "40"]
    for option in stores:
        words += [option, *(f"{name}=/stores/{name}" for name in getattr(data, option[2:]))]
    return [*words, *more]


@pytest.mark.parametrize("preset", [preset.name for preset in list_presets()])
def test_the_arms_differ_in_curriculum_objective_and_stores_alone(preset: str, tmp_path: Path) -> None:
    arms = arms_of(parse(words_of(preset, "--set", "optimizer.lr=3e-3")))
    assert next(iter(arms)) == "labels" and list(arms)[-1] == preset
    preset_has_targets = bool(load_config(TrainConfig, find_preset(preset).path, []).data.targets)
    assert ("kd" in arms) == preset_has_targets
    common = []
    for arm in arms.values():
        tree = arm.config
        config = build_config(TrainConfig, {**tree, "run": {**tree["run"], "output_dir": "run"}}, source="test")
        assert config.optimizer.lr == 3e-3 and config.run.max_steps == 40
        data = {key: value for key, value in tree["data"].items() if key not in ("targets", "scores")}
        rest = {
            key: value for key, value in tree.items() if key not in ("curriculum", "objective", "rescoring", "data")
        }
        common.append((data, rest))
    assert all(other == common[0] for other in common)
    assert arms["labels"].config["data"]["targets"] == {}


def test_plain_kd_may_have_another_store_and_the_student_its_weights() -> None:
    options = parse(words_of("rs_kd", "--kd-targets", "full", "--model", "/models/slm"))
    options.targets["full"] = "/stores/full"
    arms = arms_of(options)
    assert arms["kd"].config["data"]["targets"] == {"teacher": "/stores/full"}
    assert arms["kd"].config["objective"] == PLAIN_KD
    assert arms["rs_kd"].config["data"]["targets"] == {"teacher": "/stores/teacher"}
    assert all((a.config["model"]["config"], a.config["model"]["path"]) == (None, "/models/slm") for a in arms.values())


def test_a_store_that_the_preset_reads_must_be_named() -> None:
    with pytest.raises(UserError, match=r"the preset reads targets teacher; give --targets teacher=STORE"):
        main(["--preset", "tip", "--tokens", "/t", "--heldout", "/h"])
    with pytest.raises(UserError, match="'targets': expected NAME=STORE"):
        main(["--preset", "tip", "--tokens", "/t", "--heldout", "/h", "--targets", "targets"])


def finished_runs(tmp_path: Path, losses: dict[str, list[list[float]]]) -> Runs:
    bench = Bench(work=tmp_path, data=tmp_path, scale="cpu", seeds=(1, 2, 3))
    data: dict[str, Any] = {"tokens": "/t", "global_batch_rows": 1}
    arms = {
        name: Arm(config={"run": {"max_steps": place}, "model": {"config": {"a": 1}}, "data": data})
        for place, name in enumerate(losses, 1)
    }
    runs = Runs(bench, arms)
    for name, by_seed in losses.items():
        for seed, curve in zip(bench.seeds, by_seed, strict=True):
            folder = runs.run(name, seed).folder
            folder.mkdir(parents=True)
            lines = [
                {"kind": "eval", "step": 10 * place, "heldout_loss": loss, "calibration_error": loss / 100}
                for place, loss in enumerate(curve, 1)
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return runs


def test_the_figures_are_means_over_seeds_and_differences_by_seed(tmp_path: Path) -> None:
    runs = finished_runs(
        tmp_path,
        {
            "labels": [[5.0, 4.5], [5.0, 4.7], [5.0, 4.6]],
            "kd": [[4.5, 4.2], [4.8, 4.6], [4.7, 4.4]],
            "tip": [[4.6, 4.1], [4.6, 4.3], [4.6, 4.19]],
        },
    )
    gain_over_kd, gain_over_labels = findings_of(runs, "tip")
    assert gain_over_kd.values == pytest.approx((0.1, 0.3, 0.21))
    assert not gain_over_kd.passed  # 0.203 with an interval of half width 0.249
    assert gain_over_labels.passed
    lines = arms_table(runs).splitlines()
    assert lines[2].split()[:4] == ["labels", "4.6000", "±", "0.1000"]
    assert lines[3].endswith("10/20/20") and lines[4].endswith("20/10/10")
