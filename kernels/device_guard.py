"""Work on the device that a tensor lies on, whichever device is current.

A Triton launch and `torch.cuda.Event.record` take the *current* device and its stream, not that of their tensors: with
several GPUs in one process a launch would hand pointers of one GPU to another.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_NOTHING: AbstractContextManager[None] = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """A context with `device` as the current one; free where that is so already, and on a CPU.

    A CUDA device without an index is the current one by definition.
    """
    if device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """`on_device` of the tensor's device. Every launch of a Triton kernel belongs in one."""
    return on_device(tensor.device)
