"""How many tokens go through the passes at a time: as many as the budget for logits holds, in even parts."""

import math
from dataclasses import dataclass

import torch

from potstill.kernels.types import KernelInputError

# The largest that keeps the peak of the fused linear loss at a [128256, 2048] head below the float32 weight gradient
# and 0.75 GiB: each chunk more is a pass over that gradient (1 GiB read and written) more.
CUDA_CHUNK_BYTES = 704 << 20
CPU_CHUNK_BYTES = 32 << 20
# The products run at full speed on whole tiles of this many rows only.
ROW_MULTIPLE = 128


def chunk_budget(device: torch.device, chunk_bytes: int | None) -> int:
    """Bytes of the logits that may be there at a time. Raises KernelInputError below 1."""
    if chunk_bytes is None:
        return CUDA_CHUNK_BYTES if device.type == "cuda" else CPU_CHUNK_BYTES
    if chunk_bytes < 1:
        raise KernelInputError(f"chunk_bytes is {chunk_bytes}; expected at least 1")
    return chunk_bytes


def rows_within(num_bytes: int, row_bytes: int) -> int:
    """Rows of row_bytes that fit, 1 at least, whole multiples of ROW_MULTIPLE above it."""
    rows = max(1, num_bytes // row_bytes)
    return rows - rows % ROW_MULTIPLE if rows > ROW_MULTIPLE else rows


def even_rows(num_rows: int, most: int) -> int:
    """Rows of a chunk when num_rows are cut into as few chunks of at most `most` as can be, of nearly one size."""
    if num_rows <= most:
        return max(1, num_rows)
    rows = math.ceil(num_rows / math.ceil(num_rows / most))
    return rows if rows <= ROW_MULTIPLE else min(most, math.ceil(rows / ROW_MULTIPLE) * ROW_MULTIPLE)


def even_sizes(num_rows: int, most: int) -> list[int]:
    """The rows of each chunk; none for no rows."""
    size = even_rows(num_rows, most)
    return [min(size, num_rows - start) for start in range(0, num_rows, size)]


@dataclass(frozen=True)
class ChunkPlan:
    """The rows of each chunk, in order; kept: whether the last one's logits stay for backward."""

    sizes: list[int]
    kept: bool

    @classmethod
    def even(cls, num_rows: int, most: int) -> "ChunkPlan":
        """Nothing kept."""
        return cls(even_sizes(num_rows, most), False)

    @classmethod
    def keeping(cls, num_rows: int, most: int, *, row_bytes: int, beside: int) -> "ChunkPlan":
        """The last chunk kept where that saves a pass over the accumulator; else nothing kept.

        The last chunk and `beside` bytes, of what backward makes while it is still there, must fit where else a chunk
        of `most` rows is. row_bytes: of a row of logits. One chunk always fits: it needs no accumulator.
        """
        even = cls.even(num_rows, most)
        if len(even.sizes) == 1:
            return cls(even.sizes, True)
        room = (most * row_bytes - beside) // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE
        rest = num_rows - room
        if room < ROW_MULTIPLE or rest < 1 or len(even_sizes(rest, most)) == len(even.sizes):
            return even
        return cls([*even_sizes(rest, most), room], True)
