"""A SLURM of one's own: munged, slurmctld and two slurmd with counted GPUs, in a private folder, on the loopback.

The daemons are the real ones (Debian: `apt-get install slurm-wlm munge`, run as root); nothing of the machine's own
configuration is read or changed. Nodes say that they have more cores and GPUs than there are, so that templates of
large nodes are accepted as they stand.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from potstill.common.processes import free_port

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("127.0.0.2", "127.0.0.3")  # names that are found without a name server
HELD_SECONDS = 5.0  # between a job's end and its next turn
NUM_GPUS = 8  # of each node
ROOT = Path(__file__).resolve().parents[2]
CONFIGURATION = """\
ClusterName=potstill
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmctldParameters=idle_on_node_suspend
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=3000
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
GresTypes=gpu
"""


def missing() -> list[str]:
    """What keeps a SLURM from being started here, in words; empty where it can be."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    wanting = [f"{name} is not installed" for name in DAEMONS if shutil.which(name, path=path) is None]
    return wanting + ([] if os.geteuid() == 0 else ["the daemons need root"])


@dataclass(frozen=True)
class Cluster:
    """A running SLURM; `run` is for its commands and for whatever people type."""

    folder: Path
    environment: dict[str, str]

    def run(self, command: str, *, where: Path, seconds: float = 60, **environment: str) -> str:
        """Standard output of a shell command in the folder `where`. Raises AssertionError with all that it said."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=where,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What slurmctld knows of one job or element: JobState, ExitCode, Restarts ..."""
        text = self.run(f"scontrol show job -o {number}", where=self.folder)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def states(self) -> dict[str, str]:
        """State of each job and element that slurmctld still remembers."""
        text = self.run("squeue -h -r -t all -o '%i %T'", where=self.folder)
        return dict(line.split() for line in text.splitlines())

    def wait(self, what: str, holds: Callable[[], object], *, seconds: float) -> float:
        """Wait until it holds; returns the seconds. Raises AssertionError with the queue and the ends of the logs.

        What was requeued starts after seconds: SLURM holds it back for minutes, which tells nothing of a template. (At
        once would be too early: nodes still refuse the job by the credential of its last turn.)
        """
        began = time.monotonic()
        held: dict[str, float] = {}
        while not holds():
            for job in [job for job, state in self.states().items() if state == "PENDING"]:
                with contextlib.suppress(AssertionError):
                    if self.job(job)["Reason"] != "BeginTime":
                        held.pop(job, None)
                    elif time.monotonic() - held.setdefault(job, time.monotonic()) > HELD_SECONDS:
                        self.run(f"scontrol update JobId={job} StartTime=now", where=self.folder)
            assert time.monotonic() - began < seconds, f"{what}: not within {seconds} s\n{self.told()}"
            time.sleep(0.2)
        return time.monotonic() - began

    def wait_for_end(self, *jobs: str, seconds: float) -> dict[str, str]:
        """Wait until none of these jobs (all their elements) is in the queue; returns their states."""

        def left() -> list[str]:
            return [job for job in self.run("squeue -h -r -o %i", where=self.folder).split() if of(job)]

        def of(job: str) -> bool:
            return job.partition("_")[0] in jobs

        self.wait(f"the end of {jobs}", lambda: not left(), seconds=seconds)
        return {job: state for job, state in self.states().items() if of(job)}

    def told(self) -> str:
        """The queue, and the last lines of the controller's log."""
        queue = subprocess.run(["squeue", "-r", "-t", "all"], env=self.environment, capture_output=True, text=True)
        return queue.stdout + (self.folder / "slurmctld.log").read_text()[-3000:]


def write_configuration(folder: Path) -> None:
    """slurm.conf and gres.conf of two nodes on the loopback, and a munge key of their own."""
    host = subprocess.run(["hostname", "-s"], capture_output=True, text=True, check=True).stdout.strip()
    text = CONFIGURATION.format(host=host, folder=folder, port=free_port())
    for name in NODES:
        text += (
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} "
            f"CPUs=64 RealMemory=100000 Gres=gpu:{NUM_GPUS} State=UNKNOWN\n"
        )
    text += f"PartitionName=gpu Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP\n"
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{NUM_GPUS - 1}]\n")
    for number in range(NUM_GPUS):
        (folder / f"gpu{number}").touch()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A cluster in an empty folder that exists; all that it started is gone at the end."""
    write_configuration(folder)
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OUTPUT", "STORES")
    inherited = {name: value for name, value in os.environ.items() if name not in hidden and "SLURM" not in name}
    environment = inherited | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
    }
    munge = [f"--{name}={folder}/munge.{name}" for name in ("socket",)]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    commands = [["munged", "--foreground", "--force", *munge], ["slurmctld", "-D", "-i"]]
    commands += [["slurmd", "-D", "-N", name] for name in NODES]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        with (folder / "daemons.log").open("wb") as log:
            for command in commands:
                started = subprocess.Popen(
                    command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True
                )
                daemons.append(started)
                if command[0] == "munged":
                    wait_for_file(folder / "munge.socket", seconds=10)
        cluster = Cluster(folder, environment)
        idle = "sinfo -h -N -o '%t' 2>/dev/null || true"
        cluster.wait("idle nodes", lambda: cluster.run(idle, where=folder).split() == ["idle"] * 2, seconds=30)
        yield cluster
        cluster.run("scancel -u root", where=folder)
        cluster.wait("an empty queue", lambda: not cluster.run("squeue -h", where=folder), seconds=30)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        end = time.monotonic() + 10
        while (left := started_under(folder)) and time.monotonic() < end:
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.1)


def started_under(folder: Path) -> list[int]:
    """Processes whose environment names the folder as that of their SLURM: daemons, step managers, steps."""
    mark = f"SLURM_CONF={folder}/".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def wait_for_file(path: Path, *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} is not there after {seconds} s"
        time.sleep(0.05)
