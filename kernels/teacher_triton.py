"""Launches of the teacher's Triton kernels: two for any number of tokens, which read the logits once and as given.

Importing this needs triton; calling it needs a GPU, or triton's interpreter.
"""

import functools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from potstill.kernels.device_guard import on_device_of
from potstill.kernels.teacher_kernels import tile_kernel
from potstill.kernels.teacher_pass import TeacherRows, TopKTable
from potstill.kernels.teacher_select import select_kernel
from potstill.kernels.tiles import TILE, TileStats, padded_width

# Tiles per step and warps of tile_kernel: 16 logits a thread. Steps per program: few enough that the programs
# of a thousand rows fill a GPU several times over, enough that the label is not read again for each.
TILES_PER_STEP = 32
TILE_WARPS = 4
STEPS_PER_PROGRAM = 16
# Candidates or tiles a thread of select_kernel holds: more make its reductions cheaper, and need more registers.
PER_THREAD = 16
MIN_WARPS, MAX_WARPS = 4, 16
PAIRS = 4096  # of survivors that are compared at a time when they are put in order
PIECE = 32  # taken tiles that are looked at at a time
EXCLUDED_STEP = 256
# Low bits of a float32 that are 0 in every value of a narrower dtype: the search for the k-th best need not look there.
SILENT_BITS = {torch.bfloat16: 16, torch.float16: 13}


@functools.lru_cache(maxsize=64)
def inverse_temperatures(temperatures: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [1 + nT]: 1, then 1 / T of each, on the device for good.

    Made there number by number and kept: a copy from the host waits for all work that the GPU has queued.
    """
    return torch.stack([torch.full((), 1 / t, dtype=torch.float32, device=device) for t in (1.0, *temperatures)])


def _stat_stride(vocab_size: int) -> int:
    """Floats from one figure of a row's tiles to the next: whole 16s, so that rows begin where loads are wide."""
    return -(-padded_width(vocab_size) // TILE // 16) * 16


def _run_tiles(rows: TeacherRows, stats: Tensor, above: Tensor) -> None:
    """Launch tile_kernel for B > 0 rows; stats float32 [B, 3 + nT, stride], above int32 [B, parts] are filled."""
    parts = above.shape[1]
    tile_kernel[(above.numel(),)](
        rows.raw,
        rows.labels,
        inverse_temperatures(rows.temperatures, rows.raw.device),
        stats,
        above,
        rows.raw.stride(0),
        stats.shape[2],
        rows.vocab_size,
        padded_width(rows.vocab_size) // TILE,
        parts,
        TILES_PER_STEP * STEPS_PER_PROGRAM,
        rows.logit_scale,
        rows.soft_cap or 1.0,
        NT=len(rows.temperatures),
        TPP=TILES_PER_STEP,
        WIDTH=TILE,
        VEC=16 // rows.raw.element_size(),
        SCALED=rows.logit_scale != 1.0,
        CAP=rows.soft_cap is not None,
        num_warps=TILE_WARPS,
    )


def _tile_buffers(rows: TeacherRows) -> tuple[Tensor, Tensor]:
    """Empty (stats, above) for `_run_tiles`."""
    num_rows, device = rows.raw.shape[0], rows.raw.device
    stride = _stat_stride(rows.vocab_size)
    parts = triton.cdiv(padded_width(rows.vocab_size) // TILE, TILES_PER_STEP * STEPS_PER_PROGRAM)
    stats = torch.empty(num_rows, 3 + len(rows.temperatures), stride, dtype=torch.float32, device=device)
    return stats, torch.empty(num_rows, parts, dtype=torch.int32, device=device)


def select_shape(vocab_size: int, k: int, num_temperatures: int, parts: int) -> dict[str, int]:
    """Block sizes and warps of select_kernel."""
    num_tiles = padded_width(vocab_size) // TILE
    tiles, taken, survivors = (triton.next_power_of_2(n) for n in (num_tiles, min(k, num_tiles), 2 * k))
    piece = min(PIECE, taken)
    widest = max(tiles, piece * TILE)
    return {
        "BN": tiles,
        "PT": piece,
        "BF": max(2, triton.next_power_of_2(1 + num_temperatures)),
        "BP": triton.next_power_of_2(parts),
        "BL": survivors,
        "JB": max(1, min(survivors, PAIRS // survivors)),
        "BX": EXCLUDED_STEP,
        "num_warps": min(MAX_WARPS, max(MIN_WARPS, widest // (32 * PER_THREAD))),
    }


class TopK:
    """See teacher_pass.TopKPass. Twin of topk's way over padded chunks."""

    def __call__(self, rows: TeacherRows, k: int, out: TopKTable) -> None:
        num_rows, head = rows.raw.shape
        if not num_rows:
            return
        num_tiles = padded_width(rows.vocab_size) // TILE
        taken = min(k, num_tiles)
        stats, above = _tile_buffers(rows)
        shape = select_shape(rows.vocab_size, k, len(rows.temperatures), above.shape[1])
        scratch = torch.empty(num_rows, taken + shape["BL"], dtype=torch.int32, device=rows.raw.device)
        plain = rows.logit_scale == 1.0 and rows.soft_cap is None
        with on_device_of(rows.raw):
            _run_tiles(rows, stats, above)
            select_kernel[(num_rows,)](
                rows.raw,
                rows.labels,
                inverse_temperatures(rows.temperatures, rows.raw.device),
                stats,
                above,
                scratch,
                out.ids,
                out.logprobs,
                out.figures,
                out.label_rank,
                rows.raw.stride(0),
                stats.shape[2],
                out.figures.stride(0),
                rows.vocab_size,
                head,
                num_tiles,
                taken,
                k,
                above.shape[1],
                rows.logit_scale,
                rows.soft_cap or 1.0,
                NT=len(rows.temperatures),
                WIDTH=TILE,
                SCALED=rows.logit_scale != 1.0,
                CAP=rows.soft_cap is not None,
                LOW=SILENT_BITS.get(rows.raw.dtype, 0) if plain else 0,
                **shape,
            )

    def row_bytes(self, vocab_size: int, k: int, num_temperatures: int) -> int:
        return 4 * ((3 + num_temperatures) * _stat_stride(vocab_size) + 5 * k)


def tile_stats(slab: Tensor, label_ids: Tensor, temperatures: Sequence[float]) -> TileStats:
    """Twin of tiles.tile_stats on slab float32 [B, n * TILE] (row stride free), label_ids int64 [B]: for draws."""
    num_rows, width = slab.shape
    rows = TeacherRows(slab, label_ids, width, tuple(temperatures), None, 1.0)
    stats, above = _tile_buffers(rows)
    if num_rows:
        with on_device_of(slab):
            _run_tiles(rows, stats, above)
    num_tiles = width // TILE
    maxima, moment, *sums = stats[:, :, :num_tiles].unbind(1)
    # From each tile's own maximum to the row's: nothing to rescale inside the stream.
    top = maxima.amax(1)
    gap = maxima - top[:, None]
    moments = (gap.exp() * (moment + gap * sums[0])).sum(1)
    scaled = torch.stack([s * (gap / t).exp() for t, s in zip((1.0, *temperatures), sums, strict=True)])
    return TileStats(
        top, maxima.contiguous(), scaled, moments, above.sum(1, dtype=torch.int32) + _ties(slab, label_ids)
    )


def _ties(slab: Tensor, label_ids: Tensor) -> Tensor:
    """How many logits of the label's own tile equal it at a lower id: int32 [B]."""
    place = torch.arange(TILE, device=slab.device)
    columns = (label_ids // TILE * TILE)[:, None] + place
    equal = slab.gather(1, columns) == slab.gather(1, label_ids[:, None])
    return (equal & (columns < label_ids[:, None])).sum(1, dtype=torch.int32)


TOP_K = TopK()
