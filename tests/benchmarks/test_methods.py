"""The comparison of methods: which arms it makes, and what it reads from their runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.methods import PLAIN_KD, STUDENT, Comparison
from benchmarks.methods_report import PresetResult, Spread, table, verdict
from potstill.common.config import build_config
from potstill.launch.presets import list_presets
from potstill.student_train.config.train import TrainConfig

TARGETS = {name: f"/stores/{name}" for name in ("teacher", "early", "middle", "final", "sampled", "slm")}
SCORES = {name: f"/scores/{name}" for name in ("teacher", "slm", "reference")}


def comparison(work: Path, **changes: Any) -> Comparison:
    settings: dict[str, Any] = {
        "work": work,
        "tokens": "/stores/tokens",
        "heldout": "/stores/heldout",
        "targets": TARGETS,
        "scores": SCORES,
        "model": STUDENT,
        "steps": 40,
        "overrides": ("optimizer.lr=3e-3",),
    }
    return Comparison(**settings | changes)


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("preset", [preset.name for preset in list_presets()])
def test_the_arms_differ_in_curriculum_objective_and_stores_alone(preset: str, tmp_path: Path) -> None:
    arms = comparison(tmp_path).arms(preset)
    assert list(arms) == (["labels", preset] if preset in ("lm", "minillm_plm") else ["labels", "kd", preset])
    common = []
    for tree in arms.values():
        full = {**tree, "run": {**tree["run"], "output_dir": str(tmp_path / "run")}}
        config = build_config(TrainConfig, full, source="test")
        assert config.optimizer.lr == 3e-3 and config.run.max_steps == 40
        data = {key: value for key, value in tree["data"].items() if key not in ("targets", "scores")}
        rest = {key: value for key, value in tree.items() if key not in ("curriculum", "objective", "data")}
        common.append((data, rest))
    assert all(other == common[0] for other in common)
    assert arms["labels"]["data"]["targets"] == {}


def test_presets_share_the_runs_of_equal_baselines(tmp_path: Path) -> None:
    both = comparison(tmp_path)
    paced, tip = both.arms("paced"), both.arms("tip")
    assert both.folder(paced["kd"], 0) == both.folder(tip["kd"], 0) != both.folder(tip["kd"], 1)
    assert both.folder(paced["paced"], 0) != both.folder(tip["tip"], 0)
    assert len(both.jobs(["paced", "tip"])) == 3 * 4  # labels, kd and the two, by three seeds


def test_a_preset_may_use_another_store_and_plain_kd_a_third(tmp_path: Path) -> None:
    arms = comparison(tmp_path, renamed={"teacher": "sampled"}, kd_targets="teacher").arms("rs_kd")
    assert arms["rs_kd"]["data"]["targets"] == {"teacher": "/stores/sampled"}
    assert arms["kd"]["data"]["targets"] == {"teacher": "/stores/teacher"}
    assert arms["kd"]["objective"] == PLAIN_KD


def test_the_folder_of_a_run_follows_from_what_its_configuration_says(tmp_path: Path) -> None:
    one = comparison(tmp_path)
    tree = one.arms("tip")["tip"]
    folder = one.folder(tree, 0)
    # A key that stands at its default says nothing; so a run keeps its folder when a key is added to the project.
    objective = {key: value for key, value in tree["objective"].items() if key != "z_loss"}
    assert tree["objective"]["z_loss"] == 0.0
    assert one.folder({**tree, "objective": objective}, 0) == folder
    assert one.folder({**tree, "objective": {**objective, "z_loss": 1e-4}}, 0) != folder
    curves = [{"kind": kind, "start": 0.1, "end": 0.9} for kind in ("linear", "cosine")]
    assert len({one.folder({**tree, "objective": {**objective, "alpha": curve}}, 0) for curve in curves}) == 2


def test_a_trained_student_takes_the_place_of_random_weights(tmp_path: Path) -> None:
    arms = comparison(tmp_path, model=None, weights="/models/slm").arms("paced")
    for tree in arms.values():
        full = {**tree, "run": {**tree["run"], "output_dir": str(tmp_path / "run")}}
        model = build_config(TrainConfig, full, source="test").model
        assert (str(model.path), model.config) == ("/models/slm", None)


def result() -> PresetResult:
    def run(*losses: float) -> list[dict[str, Any]]:
        return [
            {"step": 10 * number, "heldout_loss": loss, "calibration_error": loss / 100}
            for number, loss in enumerate(losses, start=1)
        ]

    return PresetResult(
        "tip",
        {
            "labels": [run(6.0, 5.0, 4.5), run(6.0, 5.0, 4.7)],
            "kd": [run(5.5, 4.5, 4.2), run(5.5, 4.8, 4.6)],
            "tip": [run(5.4, 4.6, 4.6), run(5.0, 4.6, 4.5)],
        },
    )


def test_the_figures_are_means_over_seeds_and_differences_by_seed() -> None:
    figures = result().figures()
    assert figures["labels"]["heldout_loss"] == {"mean": 4.6, "spread": 0.1414}
    assert figures["tip"]["calibration_error"] == {"mean": 0.0455, "spread": 0.0007}
    assert figures["minus_labels"] == [0.1, -0.2]
    assert figures["minus_kd"] == [0.4, -0.1]
    assert figures["labels"]["steps_to_labels"] == [30, 30]
    assert figures["kd"]["steps_to_labels"] == [20, 30]
    assert figures["tip"]["steps_to_labels"] == [None, 20]


def test_a_verdict_needs_all_seeds_and_two_standard_errors() -> None:
    assert verdict([-0.1, -0.11, -0.12]) == "better"
    assert verdict([0.1, 0.11, 0.12]) == "worse"
    assert verdict([-0.1, 0.11, -0.2]) == "no difference"
    assert verdict([-0.001, -0.2, -0.02]) == "no difference"  # agree, but the mean is within two standard errors
    assert verdict([-0.3]) == "one seed"
    assert str(Spread.of([1.0])) == "1.0000 ± 0.0000"


def test_the_table_has_a_line_for_each_preset_and_dashes_without_kd() -> None:
    only_labels = PresetResult("minillm_plm", {k: v for k, v in result().arms.items() if k == "labels"})
    only_labels.arms["minillm_plm"] = result().arms["tip"]
    lines = table([result(), only_labels]).splitlines()
    assert lines[2].startswith("| tip | 2 | 4.6000 ± 0.1414 | 4.4000 ± 0.2828 | 4.5500 ± 0.0707 | +0.1500")
    assert lines[2].endswith("| 20/30 | never/20 |")
    assert lines[3].split("|")[4].strip() == "-"
    assert len({line.count("|") for line in lines[:4]}) == 1


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_the_whole_comparison_runs_on_real_text_and_goes_on_where_it_was(tmp_path: Path) -> None:
    data = ROOT.parent / "shared" / "data"
    if not (data / "novels").is_dir():
        pytest.skip("no folder ../shared/data beside the checkout")
    report = tmp_path / "methods.md"
    words = ["--all", "--data", str(data), "--work", str(tmp_path / "work"), "--output", str(report)]
    words += ["--presets", "tip", "rs_kd", "--every-document", "150", "--steps", "4", "--seeds", "2"]
    words += ["--trained", "tip", "--trained-steps", "2"]
    command = [sys.executable, "-m", "benchmarks.methods", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])["presets"]
    assert list(json.loads(done.stdout.splitlines()[-1])["from_trained"]) == ["tip"]
    assert list(figures) == ["tip", "rs_kd"]
    assert all(set(found) >= {"labels", "kd", "minus_kd"} for found in figures.values())
    assert figures["tip"]["kd"] == figures["rs_kd"]["kd"]  # one run, shared
    assert report.read_text().count("| tip |") == 4  # loss and calibration error, from random and from trained weights
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert again.returncode == 0 and " $ potstill" not in again.stdout, again.stdout
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
