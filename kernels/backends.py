"""Which code runs the passes over logits: plain torch anywhere, Triton on a GPU. One table, one choice."""

import importlib.util
import os
from collections.abc import Callable, Mapping

import torch

from potstill.kernels import products, rows_torch, tiles
from potstill.kernels.backend import Backend
from potstill.kernels.two_passes import TwoPasses
from potstill.kernels.types import KernelInputError

TORCH = Backend(
    name="torch",
    slab_pass=TwoPasses(rows_torch.row_stats, rows_torch.row_gradient),
    slab_dtype=rows_torch.slab_dtype,
    row_alignment=1,
    tile_stats=tiles.tile_stats,
    scale=products.scale,
)


def _torch() -> Backend:
    return TORCH


def _triton() -> Backend:
    from potstill.kernels.rows_triton import TRITON  # triton is an extra, and takes a while to import

    return TRITON


def _triton_compiled() -> Backend:
    from potstill.kernels.rows_triton import compiled

    return compiled()


# To add a backend: a Backend somewhere, an entry here. All but "torch" need triton and compute in float32.
BACKENDS: Mapping[str, Callable[[], Backend]] = {
    "torch": _torch,
    "triton": _triton,
    "triton_compiled": _triton_compiled,
}


def has_triton() -> bool:
    """Whether the package triton is installed (it is not imported)."""
    return importlib.util.find_spec("triton") is not None


def choose(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for tensors of a device and dtype; "auto" takes Triton on a GPU and torch elsewhere, and for
    float64, in which the Triton kernels do not compute. Raises KernelInputError where it cannot run."""
    if name != "auto" and name not in BACKENDS:
        raise KernelInputError(f"backend is {name!r}; expected one of {('auto', *BACKENDS)}")
    wide = dtype == torch.float64
    found = name
    if name == "auto":
        found = "torch" if device.type != "cuda" or wide else "triton"
    if found != "torch" and wide:
        raise KernelInputError(f"backend {name!r} is asked for float64 inputs; it computes in float32")
    if found != "torch" and not has_triton():
        raise KernelInputError(
            f"backend {name!r} on {device} needs the package triton, which is not installed;"
            " install it (extra `triton`), or pass backend='torch'"
        )
    if found.startswith("triton") and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise KernelInputError(f"backend {name!r} is asked for tensors on a CPU; it needs a GPU: pass backend='auto'")
    return BACKENDS[found]()
