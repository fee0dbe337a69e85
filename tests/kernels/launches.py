"""What a call would launch on a GPU, counted on a CPU, and whether it would wait for one.

Operators are counted where torch dispatches them, Triton kernels where the interpreter starts them. A view costs the
host a little and the device nothing, memory without a value likewise; all else starts a kernel. Some operators start
several, which PARTS says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# Views, memory without a value, and numbers of the host that ride on a kernel's arguments.
FREE = {
    *("alias", "as_strided", "detach", "diagonal", "expand", "permute", "select", "slice", "split", "split_with_sizes"),
    *("squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "narrow"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("scalar_tensor", "lift_fresh", "is_same_size", "resize_"),
}
# Kernels of operators that are made of several, on CUDA, at least.
PARTS = {"logsumexp": 5, "sort": 3, "topk": 2, "cumsum": 2, "index_put_": 1, "nonzero": 4, "var": 1}
# Operators that need the host to know what is on the device.
WAITS = {
    *(
        "_local_scalar_dense",
        "item",
        "nonzero",
        "masked_select",
        "is_nonzero",
        "equal",
        "unique",
        "_unique",
        "_unique2",
    ),
    *("unique_dim", "unique_consecutive", "argwhere", "bincount", "histc", "lift_fresh", "lift_fresh_copy"),
}
FUNCTION_WAITS = {
    *("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "nonzero", "tensor"),
    *("new_tensor", "as_tensor", "cpu", "argwhere", "masked_select", "unique", "equal", "allclose", "__contains__"),
}


class HostWaitError(AssertionError):
    """A call would make the host wait for a GPU."""


def short_name(function: Any) -> str:
    """index_put_ of aten.index_put_.default."""
    return str(function).split(".")[1]


@contextmanager
def kernel_launches(note: Callable[[str], None]) -> Iterator[None]:
    """Calls `note` with the name of each Triton kernel that the interpreter starts, whose own work is not seen."""
    from triton.runtime import interpreter

    run = interpreter.GridExecutor.__call__

    def noting(self: Any, *args: Any, **options: Any) -> Any:
        note(self.fn.__name__)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return run(self, *args, **options)

    interpreter.GridExecutor.__call__ = noting
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__ = run


class LaunchCounter(TorchDispatchMode):
    """Counts by name what is launched while it is on: `total`, and each of `counts`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = short_name(function)
        if name not in FREE:
            self.counts[name] += PARTS.get(name, 1)
        return function(*args, **(kwargs or {}))


def count_launches(call: Callable[[], Any]) -> Counter[str]:
    """Launches of a call by the name of operator or kernel."""
    counter = LaunchCounter()
    with counter, kernel_launches(lambda name: counter.counts.update([f"triton {name}"])):
        call()
    return counter.counts


class _NoOperatorWaits(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = short_name(function)
        if name in WAITS:
            raise HostWaitError(f"{function} waits for the device")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise HostWaitError(f"{function} with a mask waits for the device: it counts what is set")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise HostWaitError(f"{function} without output_size waits for the device")
        return function(*args, **kwargs)


class _NoFunctionWaits(TorchFunctionMode):
    """tolist and numpy read memory without a dispatch, and torch.tensor copies the host's numbers."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in FUNCTION_WAITS:
            raise HostWaitError(f"{function.__name__} makes host and device meet")
        return function(*args, **(kwargs or {}))


@contextmanager
def no_host_waits() -> Iterator[None]:
    """HostWaitError for whatever would make the host wait for a GPU, or copy from the host's own memory."""
    with _NoFunctionWaits(), _NoOperatorWaits(), kernel_launches(lambda name: None):
        yield
