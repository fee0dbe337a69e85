"""Which worker this process is: from arguments, or from what a launcher or a job scheduler put in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from potstill.common.errors import UserError


@dataclass(frozen=True)
class WorkerPlace:
    """Worker `worker` of `num_workers`; `source` says where that was read."""

    worker: int
    num_workers: int
    source: str


def worker_place(worker: int | None, num_workers: int | None, environ: Mapping[str, str] | None = None) -> WorkerPlace:
    """Place of this worker: arguments, else RANK/WORLD_SIZE, SLURM array, SLURM tasks, indexed job, else 0 of 1.

    An array of several tasks per element counts every task: worker = element * tasks + task. Raises UserError when only
    half of a pair is given or the number is out of range.
    """
    environ = os.environ if environ is None else environ
    if worker is not None and num_workers is not None:
        return _checked(worker, num_workers, "arguments")
    if worker is not None or num_workers not in (None, 1):
        place = _from_environment(environ)
        if worker is None and num_workers is not None and place.source != "default":
            return _checked(place.worker, num_workers, place.source)
        raise UserError(f"worker is {worker} and num_workers is {num_workers}; give both, or neither")
    if num_workers == 1:
        return WorkerPlace(0, 1, "arguments")
    return _from_environment(environ)


def _from_environment(environ: Mapping[str, str]) -> WorkerPlace:
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _checked(_number(environ, "RANK"), _number(environ, "WORLD_SIZE"), "RANK/WORLD_SIZE")
    task, num_tasks = 0, 1
    if "SLURM_PROCID" in environ and "SLURM_NTASKS" in environ:
        task, num_tasks = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_NTASKS")
    if "SLURM_ARRAY_TASK_ID" in environ:
        low = _number(environ, "SLURM_ARRAY_TASK_MIN") if "SLURM_ARRAY_TASK_MIN" in environ else 0
        count = _number(environ, "SLURM_ARRAY_TASK_COUNT")
        step = _number(environ, "SLURM_ARRAY_TASK_STEP") if "SLURM_ARRAY_TASK_STEP" in environ else 1
        element = (_number(environ, "SLURM_ARRAY_TASK_ID") - low) // max(1, step)
        return _checked(element * num_tasks + task, count * num_tasks, "SLURM array")
    if num_tasks > 1:
        return _checked(task, num_tasks, "SLURM tasks")
    if "JOB_COMPLETION_INDEX" in environ and "POTSTILL_NUM_WORKERS" in environ:
        return _checked(
            _number(environ, "JOB_COMPLETION_INDEX"), _number(environ, "POTSTILL_NUM_WORKERS"), "indexed job"
        )
    return WorkerPlace(0, 1, "default")


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name)
    if value is None or not value.strip().isdigit():
        raise UserError(
            f"environment variable {name} is {value!r}, expected a whole number; or give the worker yourself"
        )
    return int(value)


def _checked(worker: int, num_workers: int, source: str) -> WorkerPlace:
    if num_workers < 1 or not 0 <= worker < num_workers:
        raise UserError(f"worker {worker} of {num_workers} (from {source}): the worker must be in 0 .. num_workers - 1")
    return WorkerPlace(worker, num_workers, source)


def local_device_index(environ: Mapping[str, str] | None = None) -> int:
    """Which GPU of this node belongs to this process, when all are visible to it."""
    environ = os.environ if environ is None else environ
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if environ.get(name, "").isdigit():
            return int(environ[name])
    return 0
