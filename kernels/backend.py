"""What a backend is: the passes over a slab of logits, and the slab that they work on. Chosen in backends.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from potstill.kernels.settings import LossSettings
from potstill.kernels.teacher_pass import TopKPass
from potstill.kernels.tiles import TileStats
from potstill.kernels.types import SparseTargetTensors


@dataclass(frozen=True)
class SlabTokens:
    """The B tokens whose logits fill a slab, and what is asked of them; all tensors on the slab's device.

    targets: CSR of all N tokens of the call, or None; labels int64 [N], -100 none; rows int64 [B]: which of the N.
    width: a bound of the entries per token, known without a look at the device.
    weights, kd_weights: [B] in the accumulation dtype (float32, float64 for float64 logits).
    factors: [3] alpha, ce_weight, z_loss in that dtype. On the device, although settings hold the same numbers:
    schedules change them at every step, and compiled code would be compiled anew for each value.
    """

    settings: LossSettings
    targets: SparseTargetTensors | None
    labels: Tensor
    rows: Tensor
    width: int
    weights: Tensor
    kd_weights: Tensor
    factors: Tensor


class SlabPass(Protocol):
    """Raw logits of a slab to losses, and to their gradient in the same memory."""

    def __call__(
        self, slab: Tensor, tokens: SlabTokens, *, with_gradient: bool, factor: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(loss [B], sums [14, B] in the order of LossSums), both in the accumulation dtype.

        slab [B, V] of raw logits, in the backend's slab dtype with unit column stride, is overwritten: by d sum(loss) /
        d raw, times the 0-d `factor` if given; by anything without `with_gradient`.
        """
        ...


@dataclass(frozen=True)
class Backend:
    """A way to run the passes over logits, the student's and the teacher's.

    slab_pass: the student's loss and gradient from a slab. slab_dtype: of a slab for a head of some dtype;
    row_alignment: of its rows, in elements. tile_stats: the teacher's pass over padded float32 rows (tiles.tile_stats).
    scale: a gradient times the upstream one (products.scale). top_k: the teacher's k best straight from raw logits;
    None: from padded rows and their tile_stats.
    """

    name: str
    slab_pass: SlabPass
    slab_dtype: Callable[[torch.dtype], torch.dtype]
    row_alignment: int
    tile_stats: Callable[[Tensor, Tensor, Sequence[float]], TileStats]
    scale: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    top_k: TopKPass | None = None

    def row_stride(self, vocab_size: int) -> int:
        """Elements from one row of a slab to the next."""
        return -(-vocab_size // self.row_alignment) * self.row_alignment

    def slab(self, num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An empty slab [num_rows, V] for a head of `dtype`; rows start at multiples of row_alignment elements."""
        buffer = torch.empty(num_rows, self.row_stride(vocab_size), dtype=self.slab_dtype(dtype), device=device)
        return buffer[:, :vocab_size]
