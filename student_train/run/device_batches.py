"""A loader's batches in order, with their micro-batches on the device, each copied while the one before is computed on.

On a GPU the copies go over a stream of their own, from page-locked memory, so that neither the host nor the computing
stream waits for them. The first micro-batch of the next batch is on its way before the last one of this batch is
computed on. On a CPU the micro-batches are used where the loader's threads have made them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.student_train.data.batch import MicroBatch, map_tensors
from potstill.student_train.data.step_batch import StepBatch


@dataclass(frozen=True)
class _Copy:
    """A micro-batch on the device, and when its copy has arrived there (None: it is there)."""

    micro: MicroBatch
    arrived: torch.cuda.Event | None


class DeviceBatches:
    """Iterator over the step batches of `loader`, up to batch number `end`; it takes one ahead of the one in use.

    A batch that is taken ahead is not committed, so that a resume brings it again. What the loader raises for it is
    raised in its own turn: a damaged row ends the run at its step, not one before.
    """

    def __init__(self, loader: Iterator[StepBatch], *, device: torch.device, end: int) -> None:
        self._loader, self._device, self._end = loader, device, end
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._taken: StepBatch | Exception | None = None  # ahead of its turn
        self._under_way: _Copy | None = None  # the micro-batch that comes next
        self.wait_seconds = 0.0  # of the driving thread: for batches that were not ready, and to enqueue copies

    def __iter__(self) -> DeviceBatches:
        return self

    def __next__(self) -> StepBatch:
        """The next batch; `on_device` gives its micro-batches. Raises what the loader raises."""
        taken, self._taken = self._taken, None
        if taken is None:
            taken = self._take()
        if isinstance(taken, Exception):
            raise taken
        return taken

    def on_device(self, batch: StepBatch) -> Iterator[MicroBatch]:
        """The micro-batches of the batch that was taken last, in order. Go through all of them, once."""
        for number, micro in enumerate(batch.micros):
            current = self._under_way or self._start(micro)
            following = self._following(batch, number)
            self._under_way = None if following is None else self._start(following)
            yield self._arrived(current)

    def _take(self) -> StepBatch | Exception:
        started = time.perf_counter()
        try:
            return next(self._loader)
        except Exception as error:
            return error
        finally:
            self.wait_seconds += time.perf_counter() - started

    def _following(self, batch: StepBatch, number: int) -> MicroBatch | None:
        """The micro-batch behind number `number` of `batch`; that of the next batch is taken from the loader."""
        if number + 1 < len(batch.micros):
            return batch.micros[number + 1]
        if batch.batch + 1 >= self._end:
            return None
        self._taken = self._take()
        has_micros = isinstance(self._taken, StepBatch) and self._taken.micros
        return self._taken.micros[0] if has_micros and isinstance(self._taken, StepBatch) else None

    def _start(self, micro: MicroBatch) -> _Copy:
        if self._stream is None:
            return _Copy(micro, None)
        started = time.perf_counter()
        # Nothing to wait for on this stream: the memory comes from its own pool, and the host's numbers are final.
        with torch.cuda.stream(self._stream):
            copy = micro.to(self._device)
            arrived = torch.cuda.Event()
            arrived.record()
        self.wait_seconds += time.perf_counter() - started
        return _Copy(copy, arrived)

    def _arrived(self, copy: _Copy) -> MicroBatch:
        """The micro-batch, for the current stream: it waits for the copy, the host does not."""
        if copy.arrived is None:
            return copy.micro
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(copy.arrived)

        def used_here(tensor: Tensor) -> Tensor:
            # Or its memory would go to the next copy as soon as Python lets go of it, while kernels still read it.
            tensor.record_stream(computing)
            return tensor

        return map_tensors(copy.micro, used_here)
