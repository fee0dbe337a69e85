"""The script for SLURM of docs/cluster/datatrove.md, with the real package on a real SLURM."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from potstill.storage import StoreReader, store_status
from tests.clusters import slurm_cluster
from tests.clusters.test_datatrove import committed, digest_of_a_calm_dump, needs_datatrove, written
from tests.clusters.working_folder import make_folder

# Those of a test cluster in the place of a site's.
SITE = '{"partition": "gpu", "qos": "", "time": "01:00:00"}'
WORKER = '{"cpus_per_task": 1, "mem_per_cpu_gb": 1, "gpus_per_task": 1}'


def tasks_of(cluster: Any) -> dict[str, int]:
    """Process of the running pipeline of each element of the array."""
    found = {}
    for number in slurm_cluster.started_under(cluster.folder):
        try:
            words = Path(f"/proc/{number}/cmdline").read_bytes().decode().split("\0")
            text = Path(f"/proc/{number}/environ").read_bytes().decode()
        except OSError:
            continue
        values = dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair)
        if "launch_pickled_pipeline" in words[1] and "python" in words[0]:
            found[values["SLURM_ARRAY_TASK_ID"]] = number
    return found


def submit(cluster: Any, folder: Path) -> dict[str, str]:
    """Run the script; the number of the job of each name in the queue.

    Behind each of its arrays datatrove submits a job of the same name that adds up its statistics. The queue lists what
    waits before what runs, so only the numbers tell them apart: the array has the lower one.
    """
    cluster.run("python dump_slurm.py", where=folder, seconds=120)
    lines = cluster.run("squeue -h -o '%F %j'", where=folder).splitlines()
    found: dict[str, int] = {}
    for job, name in (line.split() for line in lines):
        found[name] = min(int(job), found.get(name, int(job)))
    return {name: str(job) for name, job in found.items()}


@needs_datatrove
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_and_out_of_time(tmp_path: Path) -> None:
    if lacking := slurm_cluster.missing():
        pytest.skip(", ".join(lacking))
    folder = make_folder(tmp_path, num_texts=2500, rows_per_unit=4)
    written(folder, "dump_slurm.py", TASKS="3", SITE=SITE, WORKER=WORKER)
    store = folder / "data" / "targets"
    (tmp_path / "slurm").mkdir()
    with slurm_cluster.running(tmp_path / "slurm") as cluster:
        jobs = submit(cluster, folder)
        cluster.wait("units", lambda: committed(store) >= 6 and len(tasks_of(cluster)) == 3, seconds=240)
        os.kill(tasks_of(cluster)["0"], signal.SIGKILL)
        cluster.run(f"scancel --signal=USR1 {jobs['dump']}_1", where=folder)  # as the end of the time does
        cluster.wait("another turn", lambda: cluster.job(f"{jobs['dump']}_1")["Restarts"] == "1", seconds=60)
        states = cluster.wait_for_end(jobs["dump"], seconds=300)
        assert states[f"{jobs['dump']}_0"] == "FAILED"
        assert [states[f"{jobs['dump']}_{element}"] for element in (1, 2)] == ["COMPLETED"] * 2
        assert store_status(store).missing > 0
        cluster.run("scancel -u root", where=folder)  # the seal waits for what never comes

        again = submit(cluster, folder)
        cluster.wait_for_end(*again.values(), seconds=300)
        states = cluster.states()
        assert states[again["seal"] + "_0"] == "COMPLETED", states
    assert store_status(store).sealed
    assert StoreReader(store).digest == digest_of_a_calm_dump(folder)
