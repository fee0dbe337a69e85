"""How the tokens are cut into chunks, and what that leaves of memory."""

from __future__ import annotations

import pytest
import torch

from potstill.kernels.chunks import CUDA_CHUNK_BYTES, ChunkPlan, chunk_budget, even_sizes, rows_within

# The design's shape in bfloat16.
N, V, D = 8192, 128256, 2048


@pytest.mark.parametrize("num_rows", [0, 1, 127, 128, 129, 300, 2816, 2817, 8191, 8192, 100_000])
@pytest.mark.parametrize("most", [1, 3, 128, 256, 2816])
def test_chunks_are_few_and_even(num_rows: int, most: int) -> None:
    sizes = even_sizes(num_rows, most)
    assert sum(sizes) == num_rows and all(0 < size <= most for size in sizes)
    assert len(sizes) == -(-num_rows // most)
    assert all(size == sizes[0] for size in sizes[:-1])
    if most >= 128 and len(sizes) > 1 and sizes[0] > 128:
        assert all(size % 128 == 0 for size in sizes[:-1])
    if num_rows == N and most == 2816:
        assert sizes == [2816, 2816, 2560]


def plan(num_rows: int, *, keeping: bool) -> ChunkPlan:
    most = rows_within(chunk_budget(torch.device("cuda"), None), 2 * V)
    if keeping:
        return ChunkPlan.keeping(num_rows, most, row_bytes=2 * V, beside=2 * V * D)
    return ChunkPlan.even(num_rows, most)


@pytest.mark.parametrize("keeping", [False, True])
@pytest.mark.parametrize("num_rows", [700, 2816, 3000, 6400, 8192, 8191, 16384])
def test_the_peak_is_the_float32_gradient_and_three_quarters_of_a_gibibyte(num_rows: int, keeping: bool) -> None:
    """Over the inputs, in forward and in backward: gradients, logits and the table of figures. The hidden gradient is
    that of the design's tokens: it grows with theirs."""
    found = plan(num_rows, keeping=keeping)
    alone = len(found.sizes) == 1
    row, head, hidden = 2 * V, V * D, 2 * min(num_rows, N) * D
    accumulator = 0 if alone and found.kept else (2 if alone else 4) * head
    table = 15 * 4 * num_rows
    last = found.sizes[-1] * row if found.kept else 0
    forward = accumulator + max(found.sizes) * row + hidden + table
    backward = accumulator + last + hidden + (0 if alone and not found.kept else 2 * head)
    assert max(forward, backward) <= 4 * head + (3 << 28)


def test_a_chunk_is_kept_only_where_that_saves_a_pass() -> None:
    assert plan(2816, keeping=True) == ChunkPlan([2816], True)
    assert plan(8192, keeping=True) == plan(8192, keeping=False)  # 3 chunks, and 4 with one kept
    assert plan(6400, keeping=True) == ChunkPlan([2816, 2816, 768], True)
    assert ChunkPlan.keeping(0, 8, row_bytes=1, beside=1) == ChunkPlan([], False)
    # A head so wide that its gradient leaves no room beside it.
    assert not ChunkPlan.keeping(6400, 2816, row_bytes=2 * V, beside=CUDA_CHUNK_BYTES).kept
