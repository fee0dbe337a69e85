"""Which code runs the row passes: plain torch anywhere, Triton on a GPU."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.kernels import products, rows_torch, tiles
from potstill.kernels import row_terms as objective
from potstill.kernels.types import KernelInputError

BACKENDS = ("auto", "torch", "triton", "triton_compiled")


@dataclass(frozen=True)
class Backend:
    """The two row passes of the student, the dtype and row alignment of the slab they work on, the teacher's
    pass, the functions of size k between the passes, and a gradient times the upstream one."""

    name: str
    row_stats: Callable[..., Any]
    row_gradient: Callable[..., Tensor]
    slab_dtype: Callable[[torch.dtype], torch.dtype]
    tile_stats: Callable[..., tiles.TileStats]
    build_fix_set: Callable[..., objective.FixSet]
    row_terms: Callable[..., objective.RowTerms]
    scale: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    row_alignment: int  # elements

    def slab(self, num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An empty slab [num_rows, V]; each row starts at a multiple of row_alignment elements."""
        stride = -(-vocab_size // self.row_alignment) * self.row_alignment
        buffer = torch.empty(num_rows, stride, dtype=self.slab_dtype(dtype), device=device)
        return buffer[:, :vocab_size]


TORCH = Backend(
    name="torch",
    row_stats=rows_torch.row_stats,
    row_gradient=rows_torch.row_gradient,
    slab_dtype=rows_torch.slab_dtype,
    tile_stats=tiles.tile_stats,
    build_fix_set=objective.build_fix_set,
    row_terms=objective.row_terms,
    scale=products.scale,
    row_alignment=1,
)


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def choose(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for tensors of a device and dtype; "auto" takes Triton on a GPU and torch elsewhere, and for
    float64, in which the Triton kernels do not compute."""
    if name not in BACKENDS:
        raise KernelInputError(f"backend is {name!r}; expected one of {BACKENDS}")
    wide = dtype == torch.float64
    if name == "torch" or (name == "auto" and (device.type != "cuda" or wide)):
        return TORCH
    if wide:
        raise KernelInputError(f"backend {name!r} is asked for float64 inputs; it computes in float32")
    if not has_triton():
        raise KernelInputError(
            f"backend {name!r} on {device} needs the package triton, which is not installed;"
            " install it (extra `triton`), or pass backend='torch'"
        )
    from potstill.kernels.rows_triton import TRITON, compiled

    return compiled() if name == "triton_compiled" else TRITON
