"""docs/cluster/hostfile.md as it stands there, over a real sshd and pdsh, and what its scripts hand to DeepSpeed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from potstill.storage import StoreReader, store_status
from potstill.teacher_dump import dump
from tests.clusters.pages import commands
from tests.clusters.ssh_nodes import PORT, Nodes, ssh_nodes, why_not
from tests.clusters.test_torchrun import newest_checkpoint
from tests.clusters.working_folder import BIN, TEMPLATES, dump_config, environment, make_folder, started, wait_until

DUMP, TRAIN, ZERO3 = commands("hostfile")
STEPS = 30


def handed_over(folder: Path, *words: str, **variables: str) -> dict[str, Any]:
    """What train_hostfile.sh gives to the deepspeed command: its words, and the file with variables for the nodes."""
    (folder / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    (folder / "deepspeed").write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps({'words': sys.argv[1:], 'file': os.environ['DS_ENV_FILE'],"
        " 'variables': open(os.environ['DS_ENV_FILE']).read()}))\n"
    )
    (folder / "deepspeed").chmod(0o755)
    done = subprocess.run(
        ["bash", str(TEMPLATES / "train_hostfile.sh"), *words],
        env={**environment(HOME=folder, HOSTFILE=folder / "hosts", DEEPSPEED=folder / "deepspeed"), **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert not Path(found["file"]).exists()  # of no use when the launcher has read it, and perhaps private
    return found


def test_variables_and_flags_reach_the_launcher(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("MINE=1\n\n")
    found = handed_over(
        tmp_path,
        "--config",
        "run.yaml",
        OMP_NUM_THREADS="7",
        EXPORT="GIVEN ABSENT",
        GIVEN="a b",
        INCLUDE="node-b:0",
        SSH_PORT="2222",
        MASTER_ADDR="127.0.0.3",
        MASTER_PORT="1234",
        LAUNCHER_ARGS="-t 5",
    )
    lines = found["variables"].splitlines()
    assert {"MINE=1", "OMP_NUM_THREADS=7", "GIVEN=a b"} <= set(lines) and all("=" in line for line in lines)
    assert any(line.startswith("TRITON_CACHE_DIR=/") for line in lines) and "ABSENT" not in found["variables"]
    words = " ".join(found["words"])
    for flag in (
        "--include=node-b:0",
        "--ssh_port=2222",
        "--master_addr=127.0.0.3",
        "--master_port 1234",
        "--force_multi",
    ):
        assert flag in words
    assert "--launcher_args=-t 5" in found["words"] and "--exclude" not in words
    assert found["words"][-2:] == ["--config", "run.yaml"]


def test_without_ssh_no_word_is_changed_and_nothing_is_joined(tmp_path: Path) -> None:
    words = ["--set", "run.name=two words; $HOME 100%h"]
    found = handed_over(tmp_path, *words, NODE_RANK="1", MASTER_ADDR="127.0.0.1")
    assert found["words"][-2:] == words and "--no_ssh" in found["words"] and "--force_multi" not in found["words"]


def test_a_dump_needs_its_output(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(TEMPLATES / "dump_hostfile.sh")], capture_output=True, text=True, timeout=30)
    assert done.returncode != 0 and "set OUTPUT" in done.stderr


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with ssh_nodes(tmp_path_factory.mktemp("ssh") / "nodes") as nodes:
        yield nodes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = {"every_steps": 3}
    folder = make_folder(
        tmp_path_factory.mktemp("hostfile"),
        num_texts=1500,
        rows_per_unit=8,
        run={"max_steps": STEPS},
        checkpoint=checkpoint,
        model={"dtype": "float32"},
    )
    (folder / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    return folder


# hostname -I says nothing of a loopback, so the tests name the address where the ranks meet.
SITE = {
    "SSH_PORT": str(PORT),
    "MASTER_ADDR": "127.0.0.1",
    "DS_ACCELERATOR": "cpu",
    "EXPORT": "DS_ACCELERATOR HF_HUB_OFFLINE",
    "TRITON_CACHE_DIR": "/tmp/potstill-test-triton",
    "DEEPSPEED": str(BIN / "deepspeed"),
}


def typed(nodes: Nodes, line: str, *, folder: Path, name: str) -> Any:
    """The running line of the page, and the file of what it says."""
    inside = nodes.inside(["bash", "-c", f"cd {folder} && {line}"])
    return started(
        inside, folder=folder, output=folder / f"{name}.log", env=environment(**{**SITE, "OMP_NUM_THREADS": 3})
    )


def finished(nodes: Nodes, line: str, *, folder: Path, name: str, seconds: float = 240) -> tuple[int, str]:
    with typed(nodes, line, folder=folder, name=name) as process:
        process.wait(seconds)
    return process.returncode, (folder / f"{name}.log").read_text(errors="replace")


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dump_with_a_worker_killed_in_the_middle(nodes: Nodes, folder: Path) -> None:
    store = folder / "data" / "targets"
    with typed(nodes, DUMP, folder=folder, name="dump-killed") as process:
        wait_until(
            lambda: (store / "run.json").exists() and store_status(store).committed >= 4,
            seconds=240,
            what="units",
            alive=process,
        )
        worker = nodes.ranks("potstill.launch")[1]
        seen = nodes.environment_of(worker)
        assert seen["OMP_NUM_THREADS"] == "3" and seen["TRITON_CACHE_DIR"] == SITE["TRITON_CACHE_DIR"]
        assert seen["DS_ACCELERATOR"] == "cpu" and seen["WORLD_SIZE"] == "2" and "HF_HOME" in seen
        nodes.kill(worker)
        assert process.wait(120) not in (0, None)
    assert store_status(store).missing > 0
    code, text = finished(nodes, DUMP, folder=folder, name="dump-again")
    assert code == 0, text
    dump(dump_config(folder, "data/calm"))
    assert StoreReader(store).digest == StoreReader(folder / "data" / "calm").digest


def teach(folder: Path) -> None:
    """Targets for the run, where no test has made them."""
    if not (folder / "data" / "targets" / "manifest.json").exists():
        dump(dump_config(folder))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_zero3_killed_in_the_middle_and_resumed(nodes: Nodes, folder: Path) -> None:
    teach(folder)
    run = folder / "runs" / "mine"
    with typed(nodes, TRAIN, folder=folder, name="train-killed") as process:
        checkpoints = run / "checkpoints"
        wait_until(
            lambda: list(checkpoints.glob("step_*/potstill.json")), seconds=240, what="a checkpoint", alive=process
        )
        nodes.kill(nodes.ranks("potstill.student_train")[1])
        code = process.wait(180)
    assert code != 0 and not (run / "done.json").exists()
    wait_until(lambda: not nodes.ranks("potstill.student_train"), seconds=60, what="the end of all ranks")

    # Words with everything that a shell, pdsh and DeepSpeed could take for theirs arrive as they were typed.
    name = "two words; $HOME `x` \\ 100%h %n"
    again = f"{TRAIN} run.name='{name}'"
    code, text = finished(nodes, again, folder=folder, name="train-again")
    assert code == 0, text
    assert json.loads((run / "done.json").read_text())["step"] == STEPS
    assert "resum" in text
    assert name in (run / "config.yaml").read_text()
    code, text = finished(nodes, f"{TRAIN} run.output_dir=runs/calm", folder=folder, name="train-calm")
    assert code == 0, text
    assert losses(run) == losses(folder / "runs" / "calm") and len(losses(run)) == STEPS


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stop_and_a_signal(nodes: Nodes, folder: Path) -> None:
    teach(folder)
    line = f"{TRAIN} run.max_steps=100000 run.output_dir=runs/stopped"
    run = folder / "runs" / "stopped"
    asks = {"stop": (run / "stop").touch, "term": lambda: nodes.terminate_script("train_hostfile.sh")}
    for name, code in (("stop", 75), ("term", 1)):
        before = newest_checkpoint(run)
        with typed(nodes, line, folder=folder, name=name) as process:
            wait_until(lambda before=before: newest_checkpoint(run) > before, seconds=240, what=name, alive=process)
            asks[name]()
            assert process.wait(120) == code, (folder / f"{name}.log").read_text()[-3000:]
        wait_until(lambda: not nodes.ranks("potstill.student_train"), seconds=60, what="the end of all ranks")
        assert not (run / "writer.json").exists()
        (run / "stop").unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_group_of_machines_holds_one_teacher(nodes: Nodes, folder: Path) -> None:
    store = folder / "data" / "zero3"
    with typed(nodes, ZERO3, folder=folder, name="zero3-killed") as process:
        wait_until(
            lambda: (store / "run.json").exists() and store_status(store).committed >= 3,
            seconds=240,
            what="units",
            alive=process,
        )
        nodes.kill(nodes.ranks("potstill.launch")[1])
        assert process.wait(180) != 0
    wait_until(lambda: not nodes.ranks("potstill.launch"), seconds=60, what="the end of all ranks")
    code, text = finished(nodes, ZERO3, folder=folder, name="zero3-again")
    assert code == 0, text
    code, text = finished(nodes, ZERO3.replace("data/zero3", "data/calm3"), folder=folder, name="zero3-calm")
    assert code == 0, text
    assert StoreReader(store).digest == StoreReader(folder / "data" / "calm3").digest
