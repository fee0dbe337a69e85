"""The templates of launch/templates start the ranks they promise, as far as one machine allows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.common.processes import free_port
from tests.student_train import tiny

TEMPLATES = Path(__file__).resolve().parents[2] / "launch" / "templates"
SCRIPTS = sorted([*TEMPLATES.glob("*.sh"), *TEMPLATES.glob("*.sbatch")])


def run(command: list[str], *, timeout_seconds: float = 150, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run to the end; whatever still lives of its process group is killed."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in hidden}
    inherited |= {"PYTHON": sys.executable, "MASTER_PORT": str(free_port()), **environment}
    process = subprocess.Popen(
        command, env=inherited, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output)


def written(stores: dict[str, Path], folder: Path, **changes: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tiny.config_tree(stores, folder / "run", run={"max_steps": 4}, **changes)))
    return path


def assert_two_ranks_are_done(folder: Path) -> None:
    assert json.loads((folder / "run" / "done.json").read_text())["step"] == 4
    manifest = folder / "run" / "checkpoints" / "step_00000004" / "potstill.json"
    assert json.loads(manifest.read_text())["world_size"] == 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short_and_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    assert len(script.read_text().splitlines()) <= 60


def test_local(stores, tmp_path: Path) -> None:
    config = written(stores, tmp_path)
    done = run(["bash", str(TEMPLATES / "train_local.sh"), "--config", str(config)], NUM_RANKS="2")
    assert done.returncode == 0, done.stdout
    assert_two_ranks_are_done(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_local_says_no_when_a_rank_fails_or_stops_early(stores, tmp_path: Path) -> None:
    script = ["bash", str(TEMPLATES / "train_local.sh"), "--config", str(written(stores, tmp_path))]
    failed = run([*script, "--set", "data.order=none"], NUM_RANKS="2")
    assert failed.returncode != 0 and "data.order" in failed.stdout, failed.stdout
    stopped = run([*script, "--set", "run.max_runtime_minutes=0.0001"], NUM_RANKS="2")
    # torchrun knows one code for all that is not 0; the marker tells the two apart.
    assert stopped.returncode == 1 and "start the same command again" in stopped.stdout, stopped.stdout
    assert not (tmp_path / "run" / "done.json").exists()
    assert run(script, NUM_RANKS="2").returncode == 0
    assert_two_ranks_are_done(tmp_path)


def fake_commands(folder: Path) -> str:
    """`srun` that starts two tasks here, and `scontrol` that writes down what it is asked. Returns a PATH."""
    folder.mkdir()
    (folder / "srun").write_text(
        "#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\ncode=0\n"
        'for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 "$@" & pids[task]=$!; done\n'
        'for task in 0 1; do wait "${pids[task]}" || code=$?; done\nexit $code\n'
    )
    (folder / "scontrol").write_text(
        f'#!/usr/bin/env bash\necho "$@" >> {folder}/asked\n[ "$1" = show ] && echo 127.0.0.1\nexit 0\n'
    )
    for name in ("srun", "scontrol"):
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.slow
def test_slurm_runs_and_asks_for_another_turn(stores, tmp_path: Path) -> None:
    path = fake_commands(tmp_path / "bin")
    slurm = {"PATH": path, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "77"}
    config = written(stores, tmp_path)
    command = ["bash", str(TEMPLATES / "train_slurm.sbatch"), "--config", str(config)]
    stopped = run([*command, "--set", "run.max_runtime_minutes=0.0001"], **slurm)
    assert stopped.returncode == 75, stopped.stdout
    assert "requeue 77" in (tmp_path / "bin" / "asked").read_text()
    done = run(command, **slurm)
    assert done.returncode == 0, done.stdout
    assert_two_ranks_are_done(tmp_path)


def test_a_missing_hostfile_is_an_error(tmp_path: Path) -> None:
    done = run(["bash", str(TEMPLATES / "train_hostfile.sh"), "--config", "x"], HOSTFILE=str(tmp_path / "none"))
    assert done.returncode == 2 and "is missing or empty" in done.stdout


@pytest.mark.slow
def test_hostfile_with_two_nodes_on_one_machine(stores, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    config = written(stores, tmp_path)
    port = str(free_port())
    environment = {**os.environ, "HOSTFILE": str(tmp_path / "hosts"), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment["DEEPSPEED"] = str(Path(sys.executable).with_name("deepspeed"))
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    nodes = [
        subprocess.Popen(
            ["bash", str(TEMPLATES / "train_hostfile.sh"), "--config", str(config)],
            env={**environment, "NODE_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=150)[0] for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert_two_ranks_are_done(tmp_path)
