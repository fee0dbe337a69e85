"""docs/cluster/torchrun.md as it stands there: two agents on this machine, one of which is lost and comes back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from potstill.common.processes import free_port
from potstill.storage import StoreReader, store_status
from potstill.teacher_dump import dump
from tests.clusters.pages import commands
from tests.clusters.working_folder import TEMPLATES, dump_config, environment, make_folder, shell, started, wait_until

TRAIN, ONE_MACHINE, ELASTIC_DUMP, SEAL = commands("torchrun")
STEPS = 600


def test_the_endpoint_is_asked_for() -> None:
    done = subprocess.run(["bash", str(TEMPLATES / "train_torchrun.sh")], capture_output=True, text=True, timeout=30)
    assert done.returncode != 0 and "set ENDPOINT to HOST:PORT" in done.stderr


def test_what_torchrun_is_given(tmp_path: Path) -> None:
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$DEEPSPEED_TIMEOUT" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    given = environment(
        PYTHON=tmp_path / "python", ENDPOINT="node-a:29400", NUM_RANKS=8, NODES="2:4", RDZV_CONF="a=1,b=2"
    )
    command = ["bash", str(TEMPLATES / "train_torchrun.sh"), "--config", "run.yaml"]
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=30)
    words = done.stdout.split()
    assert words[0] == "30" and words[-4:] == ["-m", "potstill.student_train", "--config", "run.yaml"]
    pairs = dict(pairwise(words))
    assert pairs["--nnodes"] == "2:4" and pairs["--nproc-per-node"] == "8" and pairs["--rdzv-conf"] == "a=1,b=2"
    assert pairs["--rdzv-endpoint"] == "node-a:29400" and int(pairs["--max-restarts"]) > 0


def agent(folder: Path, name: str, line: str, *, port: int) -> Any:
    """A line of the page, as one of the machines runs it."""
    line = line.replace("node-a:29400", f"127.0.0.1:{port}")
    # Without the wait for more machines that a cluster needs, a lost one is known after the 15 s of its heartbeat.
    site = environment(NUM_RANKS=1, NODES="1:2", RDZV_CONF="last_call_timeout=3", DS_ACCELERATOR="cpu")
    return started(["bash", "-c", line], folder=folder, output=folder / f"{name}.log", env=site)


def lose(process: Any) -> None:
    """The machine is gone: agent and ranks at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def train_lines(run: Path) -> dict[int, dict[str, Any]]:
    if not (run / "metrics.jsonl").exists():
        return {}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return {line["step"]: line for line in lines if line["kind"] == "train"}


def newest_checkpoint(run: Path) -> tuple[int, int]:
    """(step, number of ranks) of the newest checkpoint, (0, 0) before there is one."""
    found = sorted(run.glob("checkpoints/step_*/potstill.json"))
    if not found:
        return 0, 0
    return int(found[-1].parent.name.removeprefix("step_")), json.loads(found[-1].read_text())["world_size"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_agent_is_lost_and_comes_back(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, run={"max_steps": STEPS}, checkpoint={"every_steps": 20})
    dump(dump_config(folder))
    run, port = folder / "runs" / "mine", free_port()
    with agent(folder, "stays", TRAIN, port=port) as stays:
        wait_until(lambda: listens(port), seconds=60, what="the endpoint", alive=stays)
        with agent(folder, "lost", TRAIN, port=port) as lost:
            wait_until(lambda: newest_checkpoint(run)[1] == 2, seconds=120, what="a checkpoint of two", alive=stays)
            lose(lost)
        wait_until(lambda: newest_checkpoint(run)[1] == 1, seconds=120, what="a checkpoint of one", alive=stays)
        with agent(folder, "back", TRAIN, port=port) as back:
            before = newest_checkpoint(run)[0]
            wait_until(lambda: newest_checkpoint(run)[1] == 2, seconds=120, what="two ranks again", alive=stays)
            assert before < newest_checkpoint(run)[0] < STEPS
            assert [stays.wait(240), back.wait(60)] == [0, 0]
    assert json.loads((run / "done.json").read_text())["step"] == STEPS
    assert "universal" in (folder / "stays.log").read_text()

    line = TRAIN + " --set run.output_dir=runs/calm"
    with agent(folder, "calm-a", line, port=port) as a, agent(folder, "calm-b", line, port=port) as b:
        assert [a.wait(300), b.wait(60)] == [0, 0]
    mine, calm = train_lines(run), train_lines(folder / "runs" / "calm")
    assert list(mine) == list(calm) == list(range(1, STEPS + 1))
    for step, line_of_calm in calm.items():  # the rows of every step, whoever was there
        assert mine[step]["row_digests"] == line_of_calm["row_digests"]
    differences = [abs(mine[step]["loss"] - calm[step]["loss"]) / calm[step]["loss"] for step in calm]
    assert max(differences) < 1e-6  # a sum of two micro-batches, by one rank or by two, is the same to the bit


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_agent_that_is_asked_to_leave_costs_no_step(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, run={"max_steps": 10**6}, checkpoint={"every_steps": 10**5})
    dump(dump_config(folder))
    run, port = folder / "runs" / "mine", free_port()
    with agent(folder, "stays", TRAIN, port=port) as stays:
        wait_until(lambda: listens(port), seconds=120, what="the endpoint", alive=stays)
        with agent(folder, "leaves", TRAIN, port=port) as leaves:
            wait_until(lambda: "rank 1" in who_writes(run), seconds=240, what="two ranks", alive=stays)
            wait_until(lambda: len(train_lines(run)) > 20, seconds=240, what="steps", alive=stays)
            leaves.terminate()
            assert leaves.wait(60) != 0
            left = newest_checkpoint(run)
            assert left[1] == 2 and left[0] == max(train_lines(run))  # saved where it was, and not before
        wait_until(lambda: max(train_lines(run)) > left[0] + 5, seconds=240, what="steps of one", alive=stays)
        (run / "stop").touch()
        assert stays.wait(60) != 0
    assert newest_checkpoint(run)[1] == 1 and list(train_lines(run)) == list(range(1, newest_checkpoint(run)[0] + 1))


def who_writes(run: Path) -> str:
    """The ranks that hold the run folder."""
    try:
        marks = json.loads((run / "writer.json").read_text())["marks"]
    except (FileNotFoundError, ValueError):
        return ""
    return ", ".join(f"rank {mark['rank']}" for mark in marks)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_stop_file_is_no_failure_to_start_again_after(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, run={"max_steps": 10**6}, checkpoint={"every_steps": 20})
    dump(dump_config(folder))
    run = folder / "runs" / "mine"
    with agent(folder, "agent", TRAIN, port=free_port()) as process:
        wait_until(lambda: newest_checkpoint(run)[0], seconds=180, what="a checkpoint", alive=process)
        (run / "stop").touch()
        assert process.wait(60) != 0
    text = (folder / "agent.log").read_text()
    assert text.count("starting at step 0") == 1 and "resuming" not in text
    assert not (run / "done.json").exists() and not (run / "writer.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dumps_whose_shares_change_in_the_middle(tmp_path: Path) -> None:
    folder, port = make_folder(tmp_path, num_texts=2500, rows_per_unit=4), free_port()
    store = folder / "data" / "elastic"

    def units() -> int:
        return store_status(store).committed if (store / "run.json").exists() else 0

    with agent(folder, "stays", ELASTIC_DUMP, port=port) as stays:
        wait_until(lambda: listens(port), seconds=60, what="the endpoint", alive=stays)
        with agent(folder, "lost", ELASTIC_DUMP, port=port) as lost:
            wait_until(lambda: units() >= 4, seconds=180, what="units", alive=stays)
            lose(lost)
        with agent(folder, "back", ELASTIC_DUMP, port=port) as back:
            assert [stays.wait(240), back.wait(240)] == [0, 0]
    if not store_status(store).sealed:  # by the one that was alone at the end, if one was
        assert shell(SEAL, folder=folder, output=folder / "seal.log")[0] == 0
    code, text = shell(ONE_MACHINE, folder=folder, output=folder / "one.log")
    assert code == 0, text
    shell("potstill seal data/targets", folder=folder, output=folder / "seal-one.log")
    assert StoreReader(store).digest == StoreReader(folder / "data" / "targets").digest


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
