"""The dump templates of launch/templates start the workers they promise; they end sealed, or with an honest code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.storage import StoreReader, seal_store, store_status
from potstill.teacher_dump import DumpConfig, dump
from tests.teacher_dump.tiny import make_tokens

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "launch" / "templates"
LOCAL, SLURM, K8S = (TEMPLATES / name for name in ("dump_local.sh", "dump_slurm_array.sbatch", "dump_k8s.yaml"))
DOCS = ROOT / "docs" / "teacher.md"
SECONDS = 120
PLACING = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "JOB_COMPLETION_INDEX")


@contextmanager
def started(command: list[str], **environment: Any) -> Iterator[subprocess.Popen[str]]:
    """The running command; whatever is left of its process group at the end is killed."""
    inherited = {name: value for name, value in os.environ.items() if name not in PLACING and "SLURM" not in name}
    inherited |= {"PYTHON": sys.executable, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    inherited |= {name: str(value) for name, value in environment.items()}
    process = subprocess.Popen(
        command, env=inherited, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # all have ended by themselves
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def run(command: list[str], **environment: Any) -> tuple[int, str]:
    """Exit code and output; nothing that it has started may be alive when it has ended."""
    with started(command, **environment) as process:
        output, _ = process.communicate(timeout=SECONDS)
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    return process.returncode, output


def options(tokens: Path, model: Path) -> list[str]:
    chosen = ["--mode", "top_k", "--k", "8", "--batch-rows", "2", "--set", "teacher.check_tokenizer=false"]
    return ["--tokens", str(tokens), "--teacher", str(model), *chosen]


def config_of(tokens: Path, output: Path, model: Path) -> DumpConfig:
    teacher = {"model": model, "batch_rows": 2, "check_tokenizer": False}
    return DumpConfig(tokens=tokens, output=output, teacher=teacher, selection={"mode": "top_k", "k": 8})


def assert_equal_to_one_worker(store: Path, tokens: Path, model: Path) -> None:
    alone = store.with_name(f"{store.name}-alone")
    dump(config_of(tokens, alone, model))
    assert store_status(store).sealed
    assert StoreReader(store).digest == StoreReader(alone).digest


def kubernetes_job() -> dict[str, Any]:
    (job,) = yaml.safe_load_all(K8S.read_text())
    assert job["kind"] == "Job" and job["apiVersion"] == "batch/v1"
    return job["spec"]


@pytest.mark.parametrize("path", [LOCAL, SLURM, K8S], ids=lambda path: path.name)
def test_templates_are_short_and_parse(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    assert "TRITON_CACHE_DIR" in text and "HF_HOME" in text and text.count("your site") == 1
    if path != K8S:
        subprocess.run(["bash", "-n", str(path)], check=True, timeout=30)


def test_the_kubernetes_job_is_one_worker_per_index() -> None:
    job = kubernetes_job()
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["completionMode"] == "Indexed"
    assert environment["POTSTILL_NUM_WORKERS"] == str(job["completions"])
    # A limit per index holds for pods that are never restarted in place only.
    assert pod["restartPolicy"] == "Never" and job["backoffLimitPerIndex"] > 0
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert environment["TRITON_CACHE_DIR"].startswith("/local/") and environment["HF_HOME"].startswith("/local/")
    by_code = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert [rule["containerName"] for rule in by_code] == [container["name"]]
    subprocess.run(["bash", "-n", "-c", *container["args"]], check=True, timeout=30)


def test_local_workers_and_the_seal(tokens: Path, llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    code, text = run(["bash", str(LOCAL), *options(tokens, llama)], NUM_WORKERS=2, OUTPUT=output)
    assert code == 0, text
    assert "worker 0 of 2 did 2 units" in text and "worker 1 of 2 did 1 units" in text
    assert_equal_to_one_worker(output, tokens, llama)


@pytest.mark.parametrize("script", [LOCAL, SLURM], ids=lambda path: path.name)
def test_no_output_is_an_error(script: Path) -> None:
    code, text = run(["bash", str(script), "--tokens", "x"], NUM_WORKERS=1)
    assert code not in (0, 75) and "set OUTPUT" in text


def test_a_worker_that_fails_is_not_sealed_over(tokens: Path) -> None:
    # The store is a whole one: only the worker's code can keep the script from the seal, and from 0.
    code, text = run(["bash", str(LOCAL), "--set", "no_such_key=1"], NUM_WORKERS=1, OUTPUT=tokens)
    assert code == 1 and "no_such_key" in text and "sealed" not in text


def wait_for_a_unit(process: subprocess.Popen[str], store: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not (store / "run.json").exists() or not store_status(store).committed:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_local_workers_end_with_the_script(llama: Path, tmp_path: Path, number: signal.Signals) -> None:
    tokens = make_tokens(tmp_path / "tokens", [(16,)] * 4000, rows_per_unit=20)
    command = ["bash", str(LOCAL), *options(tokens, llama)]
    with started(command, NUM_WORKERS=2, OUTPUT=tmp_path / "out") as process:
        wait_for_a_unit(process, tmp_path / "out")
        asked = time.monotonic()
        process.send_signal(number)  # to the script alone
        text, _ = process.communicate(timeout=30)
        assert time.monotonic() - asked < 10
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    assert process.returncode == 75, text
    assert not store_status(tmp_path / "out").sealed


@pytest.mark.slow
def test_slurm_elements_a_time_limit_and_the_seal(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    asked = tmp_path / "asked"
    (tmp_path / "bin" / "scontrol").write_text(f'#!/usr/bin/env bash\necho "$@" >> {asked}\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    tokens, output = make_tokens(tmp_path / "tokens", [(16,)] * 1500, rows_per_unit=20), tmp_path / "out"
    command = ["bash", str(SLURM), *options(tokens, llama)]
    slurm = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OUTPUT": output, "SLURM_ARRAY_TASK_COUNT": 2}

    with started(command, **slurm, SLURM_ARRAY_TASK_ID=0, SLURM_JOB_ID=70) as process:
        wait_for_a_unit(process, output)
        process.send_signal(signal.SIGUSR1)  # the time limit is near
        text, _ = process.communicate(timeout=30)
    assert process.returncode == 75, text
    assert asked.read_text() == "requeue 70\n"

    # Both at once, as the scheduler would.
    with (
        started(command, **slurm, SLURM_ARRAY_TASK_ID=0, SLURM_JOB_ID=70) as first,
        started(command, **slurm, SLURM_ARRAY_TASK_ID=1, SLURM_JOB_ID=71) as second,
    ):
        texts = [process.communicate(timeout=SECONDS)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], texts
    assert "worker 0 of 2" in texts[0] and "worker 1 of 2" in texts[1]
    assert asked.read_text() == "requeue 70\n"  # nobody asked for another turn
    assert_equal_to_one_worker(output, tokens, llama)


@pytest.mark.slow
def test_slurm_element_of_a_group(tokens: Path, llama: Path, tmp_path: Path) -> None:
    command = ["bash", str(SLURM), *options(tokens, llama), "--engine", "zero3", "--device", "cpu"]
    slurm = {"SLURM_ARRAY_TASK_ID": 0, "SLURM_ARRAY_TASK_COUNT": 1, "SLURM_JOB_ID": 1, "RANKS_PER_WORKER": 2}
    code, text = run(command, **slurm, OUTPUT=tmp_path / "out")
    assert code == 0, text
    assert store_status(tmp_path / "out").sealed


@pytest.mark.slow
def test_the_command_of_the_kubernetes_job(tokens: Path, llama: Path, tmp_path: Path) -> None:
    (container,) = kubernetes_job()["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    output, config = tmp_path / "out", tmp_path / "dump.yaml"
    config.write_text(yaml.safe_dump(config_of(tokens, output, llama).model_dump(mode="json", exclude_defaults=True)))
    environment |= {"CONFIG": str(config), "OUTPUT": str(output), "POTSTILL_NUM_WORKERS": "2"}
    environment |= {name: str(tmp_path / name) for name in ("TRITON_CACHE_DIR", "HF_HOME")}
    command = [*container["command"], *container["args"]]
    for index, (units, sealed) in enumerate([(2, False), (1, True)]):
        code, text = run(command, **environment, JOB_COMPLETION_INDEX=index)
        assert code == 0, text
        assert f"worker {index} of 2 did {units} units" in text
        assert store_status(output).sealed is sealed
    assert_equal_to_one_worker(output, tokens, llama)


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_the_example_of_the_page_is_a_worker(tokens: Path, llama: Path, tmp_path: Path) -> None:
    (text,) = python_blocks()
    space: dict[str, Any] = {}
    exec(compile(text, str(DOCS), "exec"), space)  # nothing is read before a worker is called
    assert isinstance(space["config"], DumpConfig)
    space["config"] = config_of(tokens, tmp_path / "out", llama)
    for worker in range(2):
        assert f"worker {worker} of 2" in space["work"](worker, 2)
    assert "did 0 units" in space["work"](0, 2)  # nothing is left to do, and nothing is loaded
    assert not store_status(tmp_path / "out").missing
    seal_store(tmp_path / "out")
    assert_equal_to_one_worker(tmp_path / "out", tokens, llama)
