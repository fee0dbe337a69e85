"""Figures on a device that the host reads one step later, when they have long arrived: nothing waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor


class LateRead:
    """One read under way at a time: `start` enqueues the copy, `finish` gives the numbers."""

    def __init__(self, num_values: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        # Page-locked: a copy into ordinary memory would make the host wait for everything that the device has to do.
        self._host = torch.zeros(num_values, dtype=torch.float64, pin_memory=on_cuda)
        self._numbers = self._host.numpy()  # the same memory, read without a call of torch
        self._arrived = torch.cuda.Event() if on_cuda else None

    def start(self, values: Tensor) -> None:
        """Enqueue the copy of `values` float64 [num_values] behind what computes them."""
        self._host.copy_(values, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def finish(self) -> list[float]:
        """The numbers of the last `start`; waits for the device only if it has not come that far."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [float(number) for number in self._numbers]
