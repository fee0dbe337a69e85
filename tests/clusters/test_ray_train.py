"""`ray_train_loop` in Ray Train on a real cluster of this machine: killed workers, stop files, what Ray is told."""

from __future__ import annotations

import json
import os
import random
import re
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
from potstill.student_train.run.stop import STOP_FILE
from tests.clusters.pages import blocks
from tests.clusters.ray_cluster import actors, end_of, ray_folder, several_nodes, started, until
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.student_train.test_resume import steps_of

pytest.importorskip("ray")
FIT = [sys.executable, "fit.py"]
STEPS = 40


def write_script(folder: Path) -> None:
    """fit.py as the page gives it."""
    (block,) = blocks("ray", "python")
    (folder / "fit.py").write_text(block.text, encoding="utf-8")


def told_at_the_end(text: str) -> tuple[str, int, str]:
    """Status, step and checkpoint that the script prints of Ray's result."""
    found = re.findall(r"^(.*) (\d+) (\S*step_\d+)$", text, flags=re.MULTILINE)
    return found[-1][0], int(found[-1][1]), found[-1][2]


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
    write_script(tmp_path)
    with ray_folder() as environment, started(FIT, environment, tmp_path) as driver:
        for at in (9, 22):
            until(lambda at=at: newest_step(tmp_path / "run") >= at, driver, seconds=300)
            os.kill(rng.choice(actors(environment, "RayTrainWorker")), signal.SIGKILL)
        code, text = end_of(driver, tmp_path, seconds=400)
    assert code == 0, text[-4000:]
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "calm")
    newest = tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}"
    assert told_at_the_end(text) == ("done", STEPS, str(newest))
    assert "resuming at step" in text
    pointers = [json.loads(path.read_text()) for path in (tmp_path / "ray").rglob("potstill.json")]
    assert {"run": str(tmp_path / "run"), "checkpoint": str(newest), "step": STEPS} in pointers


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stop_file_ends_a_run_and_the_next_start_continues(tmp_path: Path) -> None:
    stores = tiny.write_all(tmp_path / "stores")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_tree(stores, "run")))
    write_script(tmp_path)
    with ray_folder() as environment:
        with started(FIT, environment, tmp_path) as driver:
            until(lambda: newest_step(tmp_path / "run") >= 3, driver, seconds=300)
            (tmp_path / "run" / "stop").touch()
            code, text = end_of(driver, tmp_path, seconds=300)
        assert code == 0, text[-4000:]
        status, step, _ = told_at_the_end(text)
        assert f"stop file run/{STOP_FILE}" in status and 3 <= step < STEPS
        assert read_done(tmp_path / "run") is None
        (tmp_path / "run" / STOP_FILE).unlink()  # the wish stands until a person takes it back
        with started(FIT, environment, tmp_path) as driver:
            code, text = end_of(driver, tmp_path, seconds=300)
        assert code == 0, text[-4000:]
        assert f"resuming at step {step}" in text
    assert told_at_the_end(text)[:2] == ("done", STEPS)
    assert len(steps_of(tmp_path / "run")[0]) == STEPS


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_node_that_is_taken_away_costs_no_step(tmp_path: Path) -> None:
    stores = tiny.write_all(tmp_path / "stores")
    steps = 300
    tree = {**run_tree(stores, "run"), "checkpoint": {"every_steps": steps}}
    tree["run"] = {**tree["run"], "max_steps": steps}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    calm = {**tree, "run": {**tree["run"], "output_dir": str(tmp_path / "calm")}}
    run_ranks(workers.train_run, calm, world=2, timeout_seconds=400)
    write_script(tmp_path)
    with ray_folder() as environment, several_nodes(environment, tmp_path) as (address, tell):
        tell("add 1")
        tell("add 2")
        with started(FIT, {**environment, "RAY_ADDRESS": address}, tmp_path) as driver:
            until(lambda: newest_step(tmp_path / "run") >= 3, driver, seconds=300)
            tell("drain 2")
            tell("add 3")
            code, text = end_of(driver, tmp_path, seconds=600)
    assert code == 0, text[-4000:]
    assert "waiting for Ray to take the node away" in text
    (step,) = set(re.findall(r"resuming at step (\d+)", text))
    assert 3 <= int(step) < steps
    assert not (tmp_path / "run" / "metrics.discarded.jsonl").exists()
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "calm")


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
