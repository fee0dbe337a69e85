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

    Vectors are those of all N tokens of the call, so that a kernel indexes them itself and nothing is gathered first.

    targets: CSR of the N tokens, or None; labels: int64 [N], -100 none; weights, kd_weights: [N] in the accumulation
        dtype (float32, float64 for float64 logits).
    factors: [4] alpha, ce_weight, z_loss, off_weight in that dtype. On the device, although settings hold the same
        numbers: schedules change them at every step, and compiled code would be compiled anew for each value.
    width: a bound of the entries per token, known without a look at the device.
    rows: int64 [B], which of the N; None: first .. first + count - 1. count: B.

    Ids outside 0 .. V - 1 and labels >= V: on a GPU no memory is touched there and the loss of such a token is NaN; on
    a CPU the call's checks raise before.
    """

    settings: LossSettings
    targets: SparseTargetTensors | None
    labels: Tensor
    weights: Tensor
    kd_weights: Tensor
    factors: Tensor
    width: int
    rows: Tensor | None
    first: int
    count: int

    def index(self) -> Tensor:
        """Which of the N tokens (int64 [B])."""
        if self.rows is not None:
            return self.rows
        return torch.arange(self.first, self.first + self.count, device=self.labels.device)

    def take(self, vector: Tensor) -> Tensor:
        """These tokens' part [B, ...] of a tensor over all tokens [N, ...]; a view where `rows` is None."""
        if self.rows is not None:
            return vector.index_select(0, self.rows)
        return vector.narrow(0, self.first, self.count)


class SlabPass(Protocol):
    """Raw logits of a slab to losses, and to their gradient in the same memory."""

    def __call__(
        self,
        slab: Tensor,
        tokens: SlabTokens,
        *,
        out: Tensor,
        with_gradient: bool,
        factor: Tensor | None = None,
        source: Tensor | None = None,
    ) -> None:
        """Writes `out` [15, B], accumulation dtype, any row stride and unit column stride: the loss of each token, then
        its 14 figures in the order of LossSums.

        slab [B, V] of raw logits, in the backend's slab dtype with unit column stride, is overwritten: by d sum(loss) /
        d raw, times the 0-d `factor` if given; by anything without `with_gradient`. With `source` (raw logits [N, V] of
        all tokens, unit column stride, any row stride) the logits are read from there, at the tokens' own rows, and the
        slab may hold anything before; source stays as it is.

        Tokens of weight 0 get figures of 0 and a gradient of 0, whatever their logits hold (NaN too); on a GPU their
        row is not even read.
        """
        ...


@dataclass(frozen=True)
class Backend:
    """A way to run the passes over logits, the student's and the teacher's.

    slab_pass: the student's loss and gradient from a slab. slab_dtype: of a slab for a head of some dtype;
    row_alignment: of its rows, in elements. tile_stats: the teacher's pass over padded float32 rows (tiles.tile_stats).
    scale: a gradient times the upstream one (products.scale). top_k: the teacher's k best straight from raw logits;
    None: from padded rows and their tile_stats.
    skips_unused: whether a token of weight 0 costs slab_pass next to nothing, so that none need be left out before.
    weight_gradient(total, slab, hidden, factor, dtype): the last chunk's part of the head's gradient added to those
    before (None: none) and scaled in one launch, or None (products.add_weight_gradient and scale do it then).
    """

    name: str
    slab_pass: SlabPass
    slab_dtype: Callable[[torch.dtype], torch.dtype]
    row_alignment: int
    tile_stats: Callable[[Tensor, Tensor, Sequence[float]], TileStats]
    scale: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    skips_unused: bool = False
    weight_gradient: Callable[[Tensor | None, Tensor, Tensor, Tensor, torch.dtype], Tensor] | None = None
    top_k: TopKPass | None = None

    def row_stride(self, vocab_size: int) -> int:
        """Elements from one row of a slab to the next."""
        return -(-vocab_size // self.row_alignment) * self.row_alignment

    def slab(self, num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An empty slab [num_rows, V] for a head of `dtype`; rows start at multiples of row_alignment elements."""
        buffer = torch.empty(num_rows, self.row_stride(vocab_size), dtype=self.slab_dtype(dtype), device=device)
        return buffer[:, :vocab_size]
