"""Between the host and the teacher's device without a wait for what the device has to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(array: Any, device: torch.device) -> Tensor:
    """A tensor of a NumPy array on `device`; on a GPU behind the work that is queued there, by way of pinned memory.

    From memory that is not pinned a copy waits for the stream, `non_blocking` or not.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pinned_like(value: Tensor) -> Tensor:
    """Empty host memory of the shape and dtype of `value` that a GPU can copy into behind its queue."""
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
