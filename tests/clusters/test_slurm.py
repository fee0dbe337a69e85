"""The templates and the page for SLURM on a real slurmctld with two slurmd (slurm_cluster.py), with kills.

All tests share a cluster. Each command of docs/cluster/slurm.md is run as it stands there; the last test asks for that.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.storage import StoreReader, store_status
from potstill.teacher_dump import DumpConfig, dump
from tests.clusters import slurm_cluster
from tests.clusters.pages import ROOT, commands
from tests.clusters.slurm_cluster import Cluster
from tests.student_train.tiny import STUDENT
from tests.teacher_dump.tiny import make_tokens, save_llama

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("slurm"),
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        bool(slurm_cluster.missing()),
        reason=f"no SLURM here ({'; '.join(slurm_cluster.missing())}); tests/clusters/README.md says how to install it",
    ),
]
STEPS = 150
SITE = {  # what a site with two small nodes would change in the templates
    "--array=0-63%64": "--array=0-1%2",
    "--ntasks-per-node=8": "--ntasks-per-node=1",
    "--cpus-per-task=8": "--cpus-per-task=1",
    "--cpus-per-task=4": "--cpus-per-task=1",
    "--gpus-per-node=8": "--gpus-per-node=1",
    "##SBATCH --partition=NAME": "#SBATCH --partition=gpu",
    "##SBATCH --mem=64G": "#SBATCH --mem=2G",
    "##SBATCH --mem=16G": "#SBATCH --mem=1G",
}
typed: set[str] = set()  # the commands of the page that have been run


class Folder:
    """A working folder as the page takes it for granted, on a cluster."""

    def __init__(self, path: Path, cluster: Cluster) -> None:
        self.path, self.cluster = path, cluster

    def type(self, begins: str, **environment: str) -> str:
        """Run the one command of the page that begins so; returns what it printed."""
        (line,) = [line for line in commands("slurm") if line.startswith(begins)]
        typed.add(line)
        return self.cluster.run(line, where=self.path, **environment)

    def submit(self, begins: str, **environment: str) -> str:
        """Type an sbatch command of the page; returns the number of its job."""
        return self.type(begins, **environment).split()[-1]

    def sbatch(self, words: str, **environment: str) -> str:
        return self.cluster.run(f"sbatch --parsable {words}", where=self.path, **environment).strip()

    def log(self, job: str) -> str:
        (path,) = self.path.glob(f"*-{job}.log")
        return path.read_text(errors="replace")

    def losses(self, run: str) -> dict[int, float]:
        """The loss of each step, as the run's metrics say it."""
        lines = [json.loads(line) for line in (self.path / run / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}

    def trains(self, run: str) -> bool:
        path = self.path / run / "metrics.jsonl"
        return path.exists() and '"train"' in path.read_text()

    def processes(self, *words: str, **environment: str) -> list[int]:
        """Python processes of this cluster whose command line and environment hold these."""
        found = []
        for number in slurm_cluster.started_under(self.cluster.folder):
            with suppress(OSError):
                command = Path(f"/proc/{number}/cmdline").read_bytes().decode().split("\0")
                known = Path(f"/proc/{number}/environ").read_bytes().decode(errors="replace").split("\0")
                wanted = {f"{name}={value}" for name, value in environment.items()}
                if "python" in command[0] and set(words) <= set(command) and wanted <= set(known):
                    found.append(number)
        return found


def make_folder(path: Path) -> None:
    """data/train, models/teacher, run.yaml, and the templates as the site has changed them."""
    make_tokens(path / "data" / "train", [(16,), (5, 11), (7, 9)] * 700, rows_per_unit=10)
    save_llama(path / "models" / "teacher")
    tree: dict[str, Any] = {
        "run": {"output_dir": "runs/mine", "max_steps": STEPS, "num_threads": 1},
        "model": {"config": {**STUDENT, "max_position_embeddings": 64}},
        "data": {
            "tokens": "data/train",
            "targets": {"teacher": "data/targets"},
            "global_batch_rows": 4,
            "micro_batch_rows": 2,
        },
        "curriculum": [{"targets": "teacher"}],
        "optimizer": {"lr": 3e-3},
        "logging": {"every_steps": 1},
        "zero_stage": 1,
    }
    (path / "run.yaml").write_text(yaml.safe_dump(tree))
    changed = set()
    for template in (ROOT / "launch" / "templates").glob("*.sbatch"):
        text = template.read_text()
        for there, here in SITE.items():
            changed |= {there} if there in text else set()
            text = text.replace(there, here)
        (path / template.name).write_text(text)
    assert changed == set(SITE)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    with slurm_cluster.running(folder) as cluster:
        yield cluster
    assert not slurm_cluster.started_under(folder)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without SLURM and undisturbed: data/targets by one worker, runs/mine by two ranks."""
    path = tmp_path_factory.mktemp("calm")
    make_folder(path)
    teacher = {"model": path / "models" / "teacher"}
    dump(DumpConfig(tokens=path / "data" / "train", output=path / "data" / "targets", teacher=teacher))
    command = [sys.executable, "-m", "potstill.launch", "train", "--config", "run.yaml", "--num-ranks", "2"]
    subprocess.run(command, cwd=path, check=True, timeout=200, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    return path


@pytest.fixture
def folder(cluster: Cluster, calm: Path, tmp_path: Path) -> Folder:
    """A folder with the templates, the tokens and the teacher, and no targets."""
    for name in ("data/train", "models"):
        shutil.copytree(calm / name, tmp_path / name)
    for path in [*calm.glob("*.sbatch"), calm / "run.yaml"]:
        shutil.copy(path, tmp_path)
    return Folder(tmp_path, cluster)


@pytest.fixture
def trainable(folder: Folder, calm: Path) -> Folder:
    shutil.copytree(calm / "data" / "targets", folder.path / "data" / "targets")
    return folder


def committed(store: Path) -> int:
    return store_status(store).committed if (store / "run.json").exists() else 0


def test_a_chain_with_kills_in_the_middle(folder: Folder, calm: Path) -> None:
    cluster, store = folder.cluster, folder.path / "data" / "targets"
    first = chain(folder)

    cluster.wait("a unit", lambda: committed(store), seconds=180)
    cluster.run(f"scontrol requeue {first['dump']}_1", where=folder.path)
    (worker,) = folder.processes("dump", SLURM_ARRAY_TASK_ID="0")
    os.kill(worker, signal.SIGKILL)
    states = cluster.wait_for_end(*first.values(), seconds=360)
    assert states[f"{first['dump']}_0"] == "FAILED" and states[f"{first['dump']}_1"] == "COMPLETED"
    assert cluster.job(f"{first['dump']}_1")["Restarts"] == "1"
    # Units of element 0 are missing: the seal says so with 3, and the training that waits for it is cancelled.
    assert cluster.job(first["seal"])["ExitCode"] == "3:0" and states[first["train"]] == "CANCELLED"
    done = committed(store)
    assert 0 < done < store_status(store).num_units

    # Another number of elements, one of them with a time limit that is near, then all of them cancelled.
    array = folder.submit("OUTPUT=data/targets sbatch --array=0-7%4")
    cluster.wait("a unit more", lambda: committed(store) > done, seconds=180)
    folder.type("scancel --name=potstill-dump")
    ends = cluster.wait_for_end(array, seconds=120)
    assert "CANCELLED" in ends.values() and not store_status(store).sealed, ends

    second = chain(folder)
    cluster.wait("training", lambda: folder.trains("runs/mine"), seconds=360)
    folder.type("scancel --signal=USR1 --name=potstill")  # what the time limit sends
    states = cluster.wait_for_end(*second.values(), seconds=360)
    assert set(states.values()) == {"COMPLETED"}, states
    assert "sealed" in folder.type("potstill status")
    assert StoreReader(store).digest == StoreReader(calm / "data" / "targets").digest
    assert cluster.job(second["train"])["Restarts"] == "1"
    assert "resuming at step" in folder.log(second["train"])
    assert folder.losses("runs/mine") == Folder(calm, cluster).losses("runs/mine")
    assert not list(folder.path.glob("*.turns"))


def chain(folder: Folder) -> dict[str, str]:
    """Type the chain of the page as one script; returns the numbers of its jobs."""
    lines = [line for line in commands("slurm") if re.match(r"(dump|seal|train)=|squeue", line)]
    typed.update(lines)
    text = folder.cluster.run("\n".join([*lines, "echo jobs $dump $seal $train"]), where=folder.path)
    return dict(zip(("dump", "seal", "train"), text.splitlines()[-1].split()[1:], strict=True))


def test_the_time_limit_asks_for_another_turn_and_not_for_ever(folder: Folder, calm: Path) -> None:
    cluster, store = folder.cluster, folder.path / "data" / "targets"
    options = "dump_slurm_array.sbatch --tokens data/train --teacher models/teacher"
    # Two minutes, and USR1 105 seconds before: nothing that takes a minute to start is there by then.
    slow = folder.path / "slow_python"
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *"launch dump"*|*student_train*) sleep 60;; esac\nexec {sys.executable} "$@"\n'
    )
    slow.chmod(0o755)
    idle = folder.sbatch(f"--array=0-0 --time=2 --signal=B:USR1@105 {options}", OUTPUT=str(store), PYTHON=str(slow))
    states = cluster.wait_for_end(idle, seconds=400)
    assert states == {f"{idle}_0": "FAILED"} and cluster.job(f"{idle}_0")["Restarts"] == "2"
    log = folder.log(f"{idle}_0")
    assert "3 turns in a row moved nothing" in log and "time limit shorter than loading" in log, log
    assert log.count("another turn") == 2

    # A worker at work when its time is up: what it has is kept, and its next turn does the rest.
    array = folder.sbatch(f"--array=0-1 {options}", OUTPUT=str(store))
    cluster.wait("a unit", lambda: committed(store), seconds=180)
    cluster.run(f"scancel --signal=USR1 --batch {array}_0", where=folder.path)
    states = cluster.wait_for_end(array, seconds=360)
    assert set(states.values()) == {"COMPLETED"} and cluster.job(f"{array}_0")["Restarts"] == "1", states
    assert StoreReader(store).digest == StoreReader(calm / "data" / "targets").digest

    train = folder.sbatch("--time=2 --signal=USR1@105 train_slurm.sbatch --config run.yaml", PYTHON=str(slow))
    assert cluster.wait_for_end(train, seconds=400) == {train: "FAILED"}
    assert cluster.job(train)["Restarts"] == "2" and "3 turns in a row moved nothing" in folder.log(train)


def test_two_trainings_on_one_node_do_not_meet(trainable: Folder, calm: Path) -> None:
    cluster = trainable.cluster
    where = f"--nodes=1 --ntasks-per-node=2 --nodelist={slurm_cluster.NODES[0]}"
    jobs = {
        name: trainable.sbatch(f"{where} train_slurm.sbatch --config run.yaml --set run.output_dir=runs/{name}")
        for name in ("one", "two")
    }

    def both() -> bool:
        return all(trainable.processes(RANK="0", SLURM_JOB_ID=job) for job in jobs.values())

    cluster.wait("both at once", both, seconds=120)
    states = cluster.wait_for_end(*jobs.values(), seconds=480)
    assert set(states.values()) == {"COMPLETED"}, [trainable.log(job)[-2000:] for job in jobs.values()]
    expected = Folder(calm, cluster).losses("runs/mine")
    assert trainable.losses("runs/one") == trainable.losses("runs/two") == expected


def test_a_job_whose_rank_0_was_killed_ends_soon(trainable: Folder) -> None:
    cluster = trainable.cluster
    job = trainable.sbatch("train_slurm.sbatch --config run.yaml --set run.max_steps=100000", WAIT_SECONDS="5")
    cluster.wait("training", lambda: trainable.trains("runs/mine"), seconds=240)
    (first,), (second,) = (trainable.processes(RANK=str(rank), SLURM_JOB_ID=job) for rank in range(2))
    os.kill(second, signal.SIGSTOP)  # as one that waits for rank 0 in a collective call
    os.kill(first, signal.SIGKILL)
    began = time.monotonic()
    assert cluster.wait_for_end(job, seconds=30) == {job: "FAILED"}
    assert time.monotonic() - began > 4  # ranks that stop together have so long
    assert cluster.job(job)["Restarts"] == "0"


def test_a_stop_by_a_person_stands(trainable: Folder) -> None:
    cluster = trainable.cluster
    job = trainable.sbatch("train_slurm.sbatch --config run.yaml --set run.max_steps=100000")
    cluster.wait("training", lambda: trainable.trains("runs/mine"), seconds=240)
    trainable.type("touch")
    assert cluster.wait_for_end(job, seconds=120) == {job: "FAILED"}
    about = cluster.job(job)
    assert about["ExitCode"] == "75:0" and about["Restarts"] == "0"
    assert "no other turn" in trainable.log(job) and (trainable.path / "runs/mine/stop").exists()
    saved = trainable.losses("runs/mine")

    again = trainable.submit("sbatch train_slurm.sbatch --config run.yaml --set run.max_steps=40")
    assert cluster.wait_for_end(again, seconds=180) == {again: "FAILED"}
    assert "delete the file to continue" in trainable.log(again) and cluster.job(again)["Restarts"] == "0"
    assert trainable.losses("runs/mine") == saved

    trainable.type("rm")
    steps = f"--set run.max_steps={max(saved) + 3}"
    last = trainable.sbatch(f"train_slurm.sbatch --config run.yaml {steps}")
    assert cluster.wait_for_end(last, seconds=240) == {last: "COMPLETED"}, trainable.log(last)
    assert max(trainable.losses("runs/mine")) == max(saved) + 3


def test_every_command_of_the_page_was_run() -> None:
    """After the others: a line that is added to the page has to be run by one of them."""
    assert typed == set(commands("slurm"))
