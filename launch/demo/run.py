"""The main job, whole and small: text to distilled students beside ones that saw labels only, on this machine.

It runs the commands that a person would run, as children of this one, and prints them. What is done is not done again;
what was cut short continues where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from potstill.common.errors import UserError
from potstill.common.jobs import Job, JobRunner, say
from potstill.common.processes import Child, start
from potstill.common.progress import format_seconds
from potstill.launch.demo.corpus import write_corpus
from potstill.launch.demo.report import report
from potstill.launch.demo.sizes import DemoSize, make_jobs, write_configs
from potstill.launch.ranks import count_devices
from potstill.launch.warm_server import WarmChild, warm_up

MARKER = "demo.json"
TIMES = "times.json"


def run_demo(root: Path, size: DemoSize, *, force: bool) -> str:
    """Run what is missing and return the report. Raises UserError: the folder holds something else, a job fails."""
    with demo_folder(root, size, force=force):
        run_jobs(root, size, make_jobs(size, root))
        return report(root, size, _read_times(root))


@contextlib.contextmanager
def demo_folder(root: Path, size: DemoSize, *, force: bool = False) -> Iterator[None]:
    """Make the folder ours and hold it. Raises UserError: it holds something else, or another demo runs in it."""
    _claim(root, size, force=force)
    with _only_one(root):
        yield


def run_jobs(root: Path, size: DemoSize, jobs: Sequence[Job]) -> None:
    """Write corpus and configurations, and run those of the jobs that are not done, in a folder that is held."""
    began = time.monotonic()
    corpus = root / "corpus" / "library.jsonl"
    if not corpus.is_file():
        written = write_corpus(
            corpus, max_bytes=size.corpus_bytes, noise=size.noise, heldout_fraction=size.heldout_fraction
        )
        say(f"corpus: {written.format()}")
    write_configs(size, root)
    times = _read_times(root)
    runner = _runner(root, jobs)
    try:
        runner.run()
    finally:
        for name, seconds in runner.seconds.items():
            times[name] = times.get(name, 0.0) + seconds
        (root / TIMES).write_text(json.dumps(times, indent=1) + "\n", encoding="utf-8")
    if runner.seconds:
        say(f"all jobs done in {format_seconds(time.monotonic() - began)}")


def _runner(root: Path, jobs: Sequence[Job]) -> JobRunner:
    """Two things at a time, each with one thread: on two cores that beats one thing with two threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    has_gpu = _has_gpu()
    slots = 2 if cores > 1 else 1
    os.environ |= {
        "OMP_NUM_THREADS": str(max(1, cores // slots)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        **({} if has_gpu else {"DS_ACCELERATOR": "cpu"}),
    }
    if not has_gpu:
        warm_up()
    return JobRunner(jobs, starter=_cold if has_gpu else _warm, slots=slots, log_folder=root / "logs", show=say)


def _cold(words: Sequence[str], output: Path) -> Child:
    return start([sys.executable, "-m", "potstill.launch", *words], output=output)


def _warm(words: Sequence[str], output: Path) -> Child:
    # What needs no torch gains nothing from the server.
    return WarmChild(words, output) if words[0] != "prepare" else _cold(words, output)


def _has_gpu() -> bool:
    """Ask torch only where a driver is to be seen: importing it takes seconds."""
    return (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()) and count_devices() > 0


def _claim(root: Path, size: DemoSize, *, force: bool) -> None:
    """Make the folder ours, or see that it is ours and of the same sizes."""
    wanted: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(size)))
    marker = root / MARKER
    if force and marker.is_file():
        shutil.rmtree(root)
    if root.exists() and (not root.is_dir() or (any(root.iterdir()) and not marker.is_file())):
        raise UserError(f"{root} exists and holds no demo; name a new folder with --output")
    if marker.is_file():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(marker.read_text(encoding="utf-8")) == wanted:
                return
        raise UserError(
            f"{root} holds a demo of other sizes (with or without --quick, other --noise, or of another version); "
            "name another folder with --output, or delete this one with --force"
        )
    root.mkdir(parents=True, exist_ok=True)
    partial = marker.with_suffix(".partial")
    partial.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    partial.replace(marker)


@contextlib.contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Hold the folder; the kernel lets go of it however this process ends."""
    with (root / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another demo is running in {root}; wait for it, or use another --output") from None
        yield


def _read_times(root: Path) -> dict[str, float]:
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        times: dict[str, float] = json.loads((root / TIMES).read_text(encoding="utf-8"))
        return times
    return {}
