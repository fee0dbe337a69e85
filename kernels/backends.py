"""Which code runs the row passes: plain torch anywhere, Triton on a GPU."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.kernels import rows_torch, tiles
from potstill.kernels.types import KernelInputError

BACKENDS = ("auto", "torch", "triton")


@dataclass(frozen=True)
class Backend:
    """The two row passes of the student, the dtype of the slab they work on, the teacher's pass."""

    name: str
    row_stats: Callable[..., Any]
    row_gradient: Callable[..., Tensor]
    slab_dtype: Callable[[torch.dtype], torch.dtype]
    tile_stats: Callable[..., tiles.TileStats]


TORCH = Backend("torch", rows_torch.row_stats, rows_torch.row_gradient, rows_torch.slab_dtype, tiles.tile_stats)


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def choose(name: str, device: torch.device) -> Backend:
    """The backend for tensors on `device`; "auto" takes Triton on a GPU and torch elsewhere."""
    if name not in BACKENDS:
        raise KernelInputError(f"backend is {name!r}; expected one of {BACKENDS}")
    if name == "torch" or (name == "auto" and device.type != "cuda"):
        return TORCH
    if not has_triton():
        raise KernelInputError(
            f"backend {name!r} on {device} needs the package triton, which is not installed;"
            " install it (extra `triton`), or pass backend='torch'"
        )
    from potstill.kernels.rows_triton import TRITON

    return TRITON
