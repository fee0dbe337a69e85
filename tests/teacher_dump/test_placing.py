"""Which worker a process is."""

from __future__ import annotations

import pytest

from potstill.common.errors import UserError
from potstill.teacher_dump.placing import WorkerPlace, local_device_index, worker_place

ARRAY = {"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_COUNT": "3"}


@pytest.mark.parametrize(
    ("arguments", "environ", "expected"),
    [
        ((None, None), {}, (0, 1)),
        ((2, 5), {"RANK": "0", "WORLD_SIZE": "9"}, (2, 5)),
        ((None, 1), {"RANK": "1", "WORLD_SIZE": "9"}, (0, 1)),
        ((None, None), {"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ((None, None), ARRAY, (2, 3)),
        ((None, None), ARRAY | {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (9, 12)),
        ((None, None), ARRAY | {"SLURM_ARRAY_TASK_STEP": "2"}, (1, 3)),
        ((None, None), {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (1, 4)),
        ((None, None), {"JOB_COMPLETION_INDEX": "6", "POTSTILL_NUM_WORKERS": "7"}, (6, 7)),
        ((None, 7), {"RANK": "3", "WORLD_SIZE": "8"}, (3, 7)),
    ],
)
def test_place(arguments: tuple[int | None, int | None], environ: dict[str, str], expected: tuple[int, int]) -> None:
    place = worker_place(*arguments, environ)
    assert (place.worker, place.num_workers) == expected


@pytest.mark.parametrize(
    ("arguments", "environ"),
    [
        ((1, None), {}),
        ((None, 4), {}),
        ((4, 4), {}),
        ((-1, 4), {}),
        ((0, 0), {}),
        ((None, None), {"RANK": "x", "WORLD_SIZE": "2"}),
        ((None, None), {"RANK": "2", "WORLD_SIZE": "2"}),
        ((None, None), {"SLURM_ARRAY_TASK_ID": "1"}),
    ],
)
def test_no_place(arguments: tuple[int | None, int | None], environ: dict[str, str]) -> None:
    with pytest.raises(UserError):
        worker_place(*arguments, environ)


def test_workers_of_a_slurm_array_cover_each_place_once() -> None:
    places = {
        worker_place(None, None, ARRAY | {"SLURM_ARRAY_TASK_ID": str(i), "SLURM_PROCID": str(p), "SLURM_NTASKS": "2"})
        for i in (10, 11, 12)
        for p in (0, 1)
    }
    assert places == {WorkerPlace(i, 6, "SLURM array") for i in range(6)}


def test_gpu_of_a_process() -> None:
    assert local_device_index({}) == 0
    assert local_device_index({"LOCAL_RANK": "2", "SLURM_LOCALID": "1"}) == 2
    assert local_device_index({"SLURM_LOCALID": "1"}) == 1
