"""The files for Kubernetes: against the schemas, and what their containers run, run here by hand as processes.

Nothing here talks to an API server: the commands of the page are compared with the files, not run.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.common.processes import free_port
from tests.clusters.pages import ROOT, commands
from tests.student_train import tiny

TEMPLATES = ROOT / "launch" / "templates"
FILES = ("dump_k8s.yaml", "train_k8s.yaml", "train_jobset.yaml")
VERSIONS = ("1.29", "1.30", "1.31", "1.32", "1.33")
SECRET = "potstill-secrets"
STEPS = 200


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((TEMPLATES / name).read_text()))


def job_of(name: str) -> dict[str, Any]:
    """The Job of a file: the last document, or what a JobSet makes of it."""
    document = documents(name)[-1]
    if document["kind"] == "Job":
        return document
    (replicated,) = document["spec"]["replicatedJobs"]
    labelled = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "made-by-the-jobset"}}
    return {**labelled, "spec": replicated["template"]["spec"]}


def container_of(name: str) -> dict[str, Any]:
    (container,) = job_of(name)["spec"]["template"]["spec"]["containers"]
    return container


def values_of(container: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container["env"]}


@pytest.mark.parametrize("name", FILES)
def test_pods_survive_evictions_and_ask_for_what_they_need(name: str) -> None:
    job = job_of(name)["spec"]
    pod, container = job["template"]["spec"], container_of(name)
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"]
    first, second = job["podFailurePolicy"]["rules"]  # the first that matches holds
    assert first == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert second["action"] == "FailJob" and second["onExitCodes"]["containerName"] == container["name"]
    assert second["onExitCodes"]["values"] == ([2] if name == "dump_k8s.yaml" else [1, 2, 75])
    assert pod["restartPolicy"] == "Never"  # a failure policy holds for no other
    assert {"cpu", "memory"} <= set(container["resources"]["requests"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] and pod["tolerations"]
    assert container["envFrom"] == [{"secretRef": {"name": SECRET, "optional": True}}]
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert set(mounts) == {"/data", "/local", "/dev/shm"} and len(volumes) == len(mounts)
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory" and mounts["/dev/shm"]["emptyDir"]["sizeLimit"]
    assert len((TEMPLATES / name).read_text().splitlines()) <= 60


@pytest.mark.parametrize("name", ["train_k8s.yaml", "train_jobset.yaml"])
def test_nodes_find_the_first_one(name: str) -> None:
    job, environment = job_of(name)["spec"], values_of(container_of(name))
    assert environment["NODES"] == str(job["completions"])
    assert environment["RANKS_PER_NODE"] == str(container_of(name)["resources"]["limits"]["nvidia.com/gpu"])
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 300
    *before, last = documents(name)
    own = last["metadata"]["name"]
    if name == "train_k8s.yaml":
        (service,) = before
        assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
        assert service["spec"]["selector"] == {"job-name": own} and job["backoffLimit"] > 0
        assert job["template"]["spec"]["subdomain"] == service["metadata"]["name"]
        assert environment["MASTER_ADDR"] == f"{own}-0.{service['metadata']['name']}"
    else:
        # By the documentation of jobset.x-k8s.io/v1alpha2: <JobSet>-<replicatedJob>-<job>-<pod>.<subdomain>.
        network, (replicated,) = last["spec"]["network"], last["spec"]["replicatedJobs"]
        assert network["enableDNSHostnames"] and network["publishNotReadyAddresses"]
        assert environment["MASTER_ADDR"] == f"{own}-{replicated['name']}-0-0.{network['subdomain']}"
        assert replicated["replicas"] == 1 and job["backoffLimit"] == 0
        (rule,) = last["spec"]["failurePolicy"]["rules"]
        assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_both_trainings_run_the_same() -> None:
    job, jobset = (copy.deepcopy(job_of(name)["spec"]) for name in ("train_k8s.yaml", "train_jobset.yaml"))
    for spec in (job, jobset):
        pod = spec["template"]["spec"]
        pod.pop("subdomain", None)
        spec.pop("backoffLimit")
        pod["securityContext"].pop("fsGroupChangePolicy", None)
        pod["containers"][0]["env"] = [e for e in pod["containers"][0]["env"] if e["name"] != "MASTER_ADDR"]
    assert job == jobset


@pytest.mark.skipif(find_spec("kubernetes_validate") is None, reason="kubernetes-validate is not installed")
@pytest.mark.parametrize("version", VERSIONS)
def test_files_are_valid(version: str) -> None:
    """Strict: no field that the schema does not know. A JobSet is no part of them; the Job inside is looked at."""
    import kubernetes_validate

    for name in FILES:
        whole = [document for document in documents(name) if document["kind"] != "JobSet"]
        for document in whole or [job_of(name)]:
            assert kubernetes_validate.validate(document, version, strict=True) == version
    wrong = copy.deepcopy(job_of("train_k8s.yaml"))
    wrong["spec"]["podFailurePolicy"]["rules"][0]["onPodCondition"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_the_commands_of_the_page_name_what_the_files_hold() -> None:
    """There is no cluster to run them on: files, kinds and names in them are those of the templates."""
    kinds = {(d["kind"].lower(), d["metadata"]["name"]) for name in FILES for d in documents(name)}
    images = {container_of(name)["image"] for name in FILES}
    arguments = set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    applied = set()
    for line in commands("kubernetes"):
        program, verb, *words = shlex.split(line)
        plain = [word for word in words if not word.startswith("-")]
        if program == "docker":
            assert verb == "build" and words[-1] == "." and {f"{words[words.index('-t') + 1]}:latest"} == images
            given = {words[place + 1].partition("=")[0] for place, word in enumerate(words) if word == "--build-arg"}
            assert given <= arguments
            continue
        assert program == "kubectl"
        if verb == "apply":
            assert words[0] == "-f"
            applied.add(words[1])
        elif verb == "create":
            assert plain[:3] == ["secret", "generic", SECRET]
            assert all(re.fullmatch(r"--from-literal=[A-Z_]+=\.\.\.", word) for word in words[3:])
        else:
            assert verb in ("wait", "logs", "delete")
            (place,) = [" ".join(plain)] if verb == "delete" else plain
            assert tuple(re.split(r"[ /]", place)) in kinds, line
    assert applied == set(FILES)


@contextmanager
def pod(folder: Path, index: int, port: int, **changes: str) -> Iterator[subprocess.Popen[bytes]]:
    """What the container of one pod runs, as a process in `folder`; gone at the end with all that it has started."""
    container = container_of("train_k8s.yaml")
    values = {**values_of(container), "CONFIG": "run.yaml", "RANKS_PER_NODE": "1", "JOB_COMPLETION_INDEX": str(index)}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **changes}
    values |= {"TRITON_CACHE_DIR": str(folder / "triton"), "HF_HOME": str(folder / "hf")}
    command = [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], word) for word in container["command"]]
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    kept |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src")}
    with (folder / f"pod{index}.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=kept | values, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its ranks are killed by the kernel with it
        process.wait(10)


def until(what: str, holds: Callable[[], object], folder: Path, *, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not holds():
        logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("pod*.log")))
        assert time.monotonic() < end, f"{what}: not within {seconds} s\n{logs}"
        time.sleep(0.1)


def losses(folder: Path) -> dict[int, float]:
    path = folder / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def written(folder: Path, stores: dict[str, Path], *, max_steps: int) -> None:
    tree = tiny.config_tree(stores, Path("run"), run={"max_steps": max_steps}, logging={"every_steps": 1}, zero_stage=1)
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_evicted_pod_a_killed_one_and_a_persons_stop(tmp_path: Path) -> None:
    stores = tiny.write_all(tmp_path / "stores")
    for name in ("calm", "here"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, stores, max_steps=STEPS)
    here, port = tmp_path / "here", free_port()
    calm = [sys.executable, "-m", "potstill.launch", "train", "--config", "run.yaml", "--num-ranks", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    subprocess.run(calm, cwd=tmp_path / "calm", env=environment, check=True, timeout=200)

    with pod(here, 0, port) as first:
        with pod(here, 1, port) as second:
            until("training", lambda: losses(here), here)
            second.terminate()  # an eviction
            assert second.wait(100) == 143
        at = max(losses(here))
        assert first.poll() is None and 0 < at < STEPS
        until("the save that all made together", lambda: list(here.glob("run/checkpoints/*/potstill.json")), here)
        with pod(here, 1, port) as replacement:
            until("training again", lambda: max(losses(here)) > at, here)
            assert [first.wait(150), replacement.wait(30)] == [0, 0], (here / "pod0.log").read_text()[-3000:]
    assert losses(here) == losses(tmp_path / "calm") and (here / "run" / "done.json").exists()

    # Longer, and a pod that is lost without a word; then a person's stop, which no start overrules.
    written(here, stores, max_steps=100_000)
    with pod(here, 0, port) as first:
        with pod(here, 1, port) as second:
            until("training", lambda: max(losses(here)) > STEPS, here)
            second.kill()
        until(
            "the other's next turn",
            lambda: "again in" in (here / "pod0.log").read_text().split(f"step {STEPS + 1}/")[-1],
            here,
        )
        with pod(here, 1, port) as replacement:
            until("both again", lambda: (here / "pod0.log").read_text().count(f"resuming at step {STEPS}") == 2, here)
            at = len((here / "run" / "metrics.jsonl").read_text())
            until("training again", lambda: len((here / "run" / "metrics.jsonl").read_text()) > at + 500, here)
            (here / "run" / "stop").touch()
            assert [first.wait(150), replacement.wait(150)] == [75, 75]
    assert (here / "run" / "stop").exists()
    shutil.copy(here / "run" / "metrics.jsonl", here / "before")
    with pod(here, 0, port) as first, pod(here, 1, port) as second:
        assert [first.wait(150), second.wait(150)] == [75, 75]
    assert (here / "run" / "metrics.jsonl").read_bytes() == (here / "before").read_bytes()
