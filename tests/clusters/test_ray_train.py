"""`ray_train_loop` in Ray Train on a real cluster of this machine: killed workers, stop files, what Ray is told."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.common.errors import ConfigError
from potstill.student_train.ray_loop import read_loop_config
from potstill.student_train.run.metrics import read_metrics
from potstill.student_train.run.run_folder import read_done
from tests.clusters.ray_cluster import actors, end_of, ray_folder, started, until
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.student_train.test_resume import steps_of

pytest.importorskip("ray")
FIT = [sys.executable, str(Path(__file__).with_name("fit_student.py"))]
STEPS = 40


def run_tree(stores: dict[str, Path], output: str) -> dict[str, Any]:
    return tiny.config_tree(
        stores,
        Path(output),
        run={"max_steps": STEPS},
        checkpoint={"every_steps": 4},
        eval={"every_steps": 20},
        logging={"every_steps": 1},
        zero_stage=1,
    )


def newest_step(run: Path) -> int:
    return max((int(record["step"]) for record in read_metrics(run)), default=0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_workers_leave_no_trace_in_the_losses(tmp_path: Path) -> None:
    stores = tiny.write_all(tmp_path / "stores")
    run_ranks(workers.train_run, run_tree(stores, str(tmp_path / "calm")), world=2, timeout_seconds=300)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_tree(stores, "run")))
    rng = random.Random(3)
    with ray_folder() as environment, started([*FIT, "4"], environment, tmp_path) as driver:
        for at in (9, 22):
            until(lambda at=at: newest_step(tmp_path / "run") >= at, driver, seconds=300)
            os.kill(rng.choice(actors(environment, "RayTrainWorker")), signal.SIGKILL)
        code, text = end_of(driver, tmp_path, seconds=400)
    assert code == 0, text[-4000:]
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "calm")
    result = json.loads((tmp_path / "result.json").read_text())
    told = result["metrics"]
    assert (told["step"], told["status"]) == (STEPS, "done") and result["checkpoint"] == ["potstill.json"]
    lines = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert told["train/loss"] == lines[-1]["loss"]
    assert Path(told["checkpoint"]) == tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}"
    assert any(name.startswith("eval/") for name in told)
    assert "resuming at step" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stop_file_ends_a_run_and_the_next_start_continues(tmp_path: Path) -> None:
    stores = tiny.write_all(tmp_path / "stores")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_tree(stores, "run")))
    with ray_folder() as environment:
        with started([*FIT, "2"], environment, tmp_path) as driver:
            until(lambda: newest_step(tmp_path / "run") >= 3, driver, seconds=300)
            (tmp_path / "run" / "stop").touch()
            code, text = end_of(driver, tmp_path, seconds=300)
        assert code == 0, text[-4000:]
        told = json.loads((tmp_path / "result.json").read_text())["metrics"]
        assert told["status"].startswith("stop file") and 3 <= told["step"] < STEPS
        assert read_done(tmp_path / "run") is None
        with started([*FIT, "2"], environment, tmp_path) as driver:
            code, text = end_of(driver, tmp_path, seconds=300)
        assert code == 0, text[-4000:]
        assert f"resuming at step {told['step']}" in text
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["status"] == "done"
    assert len(steps_of(tmp_path / "run")[0]) == STEPS


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"configuration": "run.yaml"}, "expected config, set or folder"),
        ({"set": "run.max_steps=3"}, "expected a list of texts KEY=VALUE"),
        ({"folder": "no/such/folder"}, "every node"),
    ],
)
def test_what_the_loop_cannot_use_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_loop_config(given)
