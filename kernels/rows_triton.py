"""Launches of the Triton kernels, with the signatures of their torch twins (rows_torch.py).

Slabs keep the dtype of the head (bfloat16, float16, float32): a pass over them is bound by memory, and half the bytes
are half the time. All else here is float32, as the kernels compute.
Importing this needs triton; calling it needs a GPU, or triton's interpreter.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from potstill.kernels import gradients_triton
from potstill.kernels.backend import Backend
from potstill.kernels.one_pass import OnePass, fill_of
from potstill.kernels.row_terms import FixSet, RowStats, RowTerms, build_fix_set, row_terms
from potstill.kernels.settings import LossSettings
from potstill.kernels.soft_cap import cap_slope
from potstill.kernels.teacher_triton import TOP_K, tile_stats
from potstill.kernels.triton_kernels import dense_grad_kernel, stats_kernel
from potstill.kernels.two_passes import TwoPasses

# Columns per step of a row kernel, on 8 warps. Wider ones would need more than 64 registers per thread, and
# 65536 columns spill 15 KB of them.
MAX_BLOCK = 8192
HALF_BLOCK = 4096  # a soft cap, or a second temperature of float32 rows, needs more registers per element


def block_shape(vocab_size: int, width: int, dtype: torch.dtype, settings: LossSettings) -> dict[str, int]:
    """Block sizes and warps of the row kernels for rows of V columns and F fix-ups."""
    heavy = settings.soft_cap is not None or (dtype == torch.float32 and settings.student_temperature != 1.0)
    block = min(HALF_BLOCK if heavy else MAX_BLOCK, max(256, triton.next_power_of_2(vocab_size)))
    return {
        "BV": block,
        "BF": max(16, triton.next_power_of_2(width)),
        "num_warps": min(8, max(2, block // 512)),
    }


def slab_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the slab for a head of `dtype`: the same."""
    return dtype


def row_stats(slab: Tensor, fix: FixSet, settings: LossSettings, *, keep_exp: bool) -> tuple[RowStats, Tensor]:
    """Twin of rows_torch.row_stats on slab [B, V] (row stride free); the second value is `used` uint8 [B, F]."""
    num_rows, vocab_size = slab.shape
    width = fix.ids.shape[1]
    used = fix.used.to(torch.uint8)
    fixed = torch.empty(num_rows, width, dtype=torch.float32, device=slab.device)
    out = torch.empty(4, num_rows, dtype=torch.float32, device=slab.device)
    stats_kernel[(num_rows,)](
        slab,
        fix.ids,
        used,
        fixed,
        out,
        slab.stride(0),
        num_rows,
        vocab_size,
        width,
        settings.logit_scale,
        settings.soft_cap or 1.0,
        1 / settings.student_temperature,
        TWO=settings.student_temperature != 1.0,
        CAP=settings.soft_cap is not None,
        FILL=fill_of(slab.dtype),
        **block_shape(vocab_size, width, slab.dtype, settings),
    )
    return RowStats(fixed, *out.unbind(0)), used


def row_gradient(
    slab: Tensor, state: Tensor, stats: RowStats, terms: RowTerms, fix: FixSet, settings: LossSettings
) -> Tensor:
    """Twin of rows_torch.row_gradient on slab [B, V] after row_stats; state: `used` uint8 [B, F]."""
    num_rows, vocab_size = slab.shape
    width = fix.ids.shape[1]
    scale, cap = settings.logit_scale, settings.soft_cap
    value = terms.fix_grad * cap_slope(torch.where(fix.used, stats.fix, 0.0), logit_scale=scale, soft_cap=cap)  # [B, F]
    single = settings.student_temperature == 1.0
    first = terms.dense_t + terms.dense_1 if single else terms.dense_t
    slope = scale if cap is None else 1.0
    rows = torch.stack([first * slope, stats.log_rest_t, terms.dense_1 * slope, stats.log_rest])
    # A row without a rest has lse -inf there; all its columns are fix-ups, so any finite number will do.
    rows = torch.where(rows == -torch.inf, 0.0, rows)
    dense_grad_kernel[(num_rows,)](
        slab,
        fix.ids,
        state,
        value.contiguous(),
        rows,
        slab.stride(0),
        num_rows,
        vocab_size,
        width,
        scale,
        cap or 1.0,
        1 / settings.student_temperature,
        TWO=not single and settings.plain_gradient,
        CAP=cap is not None,
        FILL=fill_of(slab.dtype),
        **block_shape(vocab_size, width, slab.dtype, settings),
    )
    return slab


TRITON = Backend(
    name="triton",
    slab_pass=OnePass(otherwise=TwoPasses(row_stats, row_gradient)),
    slab_dtype=slab_dtype,
    row_alignment=64,
    tile_stats=tile_stats,
    top_k=TOP_K,
    scale=gradients_triton.scale,
    skips_unused=True,
    weight_gradient=gradients_triton.weight_gradient,
)


@functools.cache
def compiled(compiler: str | Callable[..., Any] = "inductor") -> Backend:
    """TRITON with the steps between two passes fused by torch.compile, where it takes two passes at all.

    They are about a hundred operations on [B, k] tensors: each is nothing, but launched one by one they
    take as long as a good part of a pass over the logits. Compiling takes about a minute per setting. `fullgraph` makes
    what cannot be compiled, and what would be compiled ever anew, an error; without it both fall back in silence.
    """
    between = TwoPasses(
        row_stats,
        row_gradient,
        build_fix_set=torch.compile(build_fix_set, dynamic=True, fullgraph=True, backend=compiler),
        row_terms=torch.compile(row_terms, dynamic=True, fullgraph=True, backend=compiler),
    )
    return dataclasses.replace(TRITON, name="triton_compiled", slab_pass=OnePass(otherwise=between))
