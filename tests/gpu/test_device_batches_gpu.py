"""Batches on their way to a GPU: page-locked, copied ahead on a stream of their own, never read too early or late.

Skips itself without a CUDA device. Run: PYTHONPATH=src python -m pytest tests/gpu -n 8 --dist loadgroup -q
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from potstill.student_train.data.batch import map_tensors
from potstill.student_train.data.step_batch import StepBatch
from potstill.student_train.run.device_batches import DeviceBatches
from potstill.student_train.run.late_read import LateRead
from tests.student_train import tiny
from tests.student_train.test_batches_ahead import open_loader, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]
NUM_STEPS, BUSY = 6, 4096


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[StepBatch]:
    """Step batches as the loader's threads make them, of two micro-batches or more."""
    root: Path = tmp_path_factory.mktemp("batches")
    loader, _ = open_loader(tiny.write_all(root / "stores"), root / "run", data={"micro_batch_rows": 1})
    with loader:
        return [next(loader) for _ in range(NUM_STEPS)]


@contextmanager
def no_wait_for_the_device() -> Iterator[None]:
    """Any call that waits for the GPU raises while open."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pinned(batch: StepBatch) -> StepBatch:
    return replace(batch, micros=[map_tensors(micro, torch.Tensor.pin_memory) for micro in batch.micros])


def test_a_pinned_micro_batch_is_pinned_as_a_whole(real: list[StepBatch]) -> None:
    for before, after in zip(real[0].micros, pinned(real[0]).micros, strict=True):
        found = tensors(after)
        assert found.keys() == tensors(before).keys() and all(tensor.is_pinned() for tensor in found.values())
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors(before).items())


def test_micro_batches_arrive_whole_while_the_device_is_busy_and_the_host_never_waits(real: list[StepBatch]) -> None:
    """Sums over what arrived, computed behind long products, are those of the CPU: nothing is overwritten or unread."""
    device = torch.device("cuda")
    busy = torch.randn(BUSY, BUSY, device=device)
    sums: list[torch.Tensor] = []
    batches = DeviceBatches(iter([pinned(batch) for batch in real]), device=device, end=NUM_STEPS)
    torch.cuda.synchronize()
    with no_wait_for_the_device():
        for number in range(NUM_STEPS):
            batch = next(batches)
            assert batch.batch == number
            for micro in batches.on_device(batch):
                busy = (busy @ busy).clamp(-1.0, 1.0)  # the sums below run long after Python lets go of the micro-batch
                sums.append(torch.stack([tensor.double().nan_to_num().sum() for tensor in tensors(micro).values()]))
                del micro
    expected = [
        torch.stack([tensor.double().nan_to_num().sum() for tensor in tensors(micro).values()])
        for batch in real
        for micro in batch.micros
    ]
    assert len(sums) == len(expected)
    for found, wanted in zip(sums, expected, strict=True):
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-12, atol=1e-9)


def test_a_late_read_does_not_wait_and_sees_what_was_there_at_its_start() -> None:
    device = torch.device("cuda")
    busy = torch.randn(BUSY, BUSY, device=device)
    read, values = LateRead(3, device), torch.zeros(3, dtype=torch.float64, device=device)
    torch.cuda.synchronize()
    with no_wait_for_the_device():
        for _ in range(8):
            busy = (busy @ busy).clamp(-1.0, 1.0)
        values += 2.5
        read.start(values)
        values.zero_()
    assert read.finish() == [2.5, 2.5, 2.5]
