"""The row passes in plain torch: the CPU backend, and the reference of the Triton kernels.

`row_stats` streams once over a slab of raw logits, `row_gradient` overwrites it with d loss / d logits.
Both work on blocks of rows that stay in a core's cache. The fix-up columns leave the stream before it
starts, so the mass of the rest is a plain sum and never `1 - sum q`, which loses all digits when small.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.kernels.objective import FixSet, RowStats, RowTerms
from potstill.kernels.settings import LossSettings

# Finite, so that (z - max) * exp(z - max) is -0 and not NaN where a column was taken out.
FILL = -1e30
BLOCK_BYTES = 2 << 20


@dataclass(frozen=True)
class SlabState:
    """What the slab holds between the passes: positions of the fix-ups; exp(z - shift) if `is_exp`."""

    position: Tensor  # int64 [M] flat positions of the used fix-ups
    shift: Tensor  # [B]
    is_exp: bool


def slab_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _transform(values: Tensor, settings: LossSettings) -> Tensor:
    """z from raw logits, in place: scale, then soft cap."""
    if settings.logit_scale != 1.0:
        values = values.mul_(settings.logit_scale)
    if settings.soft_cap is not None:
        values = values.div_(settings.soft_cap).tanh_().mul_(settings.soft_cap)
    return values


def _slope(values: Tensor, settings: LossSettings) -> Tensor | float:
    """dz / d raw at z."""
    if settings.soft_cap is None:
        return settings.logit_scale
    return settings.logit_scale * (1 - (values / settings.soft_cap).square())


def _blocks(slab: Tensor) -> list[slice]:
    rows = max(1, BLOCK_BYTES // max(1, slab.shape[1] * slab.element_size()))
    return [slice(start, start + rows) for start in range(0, slab.shape[0], rows)]


def row_stats(slab: Tensor, fix: FixSet, settings: LossSettings, *, keep_exp: bool) -> tuple[RowStats, SlabState]:
    """Statistics of `slab` [B, V] (float32 or float64 raw logits, overwritten)."""
    num_rows, vocab_size = slab.shape
    single = settings.temperature == 1.0
    # A -inf logit would make (z - max) * exp(z - max) a NaN; z below FILL has probability 0 either way.
    fixed = _transform(slab.gather(1, fix.ids), settings).clamp_min_(FILL)
    fixed = torch.where(fix.used, fixed, -math.inf)
    _transform(slab, settings)
    row, column = fix.used.nonzero(as_tuple=True)
    position = row * vocab_size + fix.ids[row, column]
    slab.view(-1)[position] = FILL
    maximum = slab.new_empty(num_rows)
    total, total_t, moment = (torch.empty_like(maximum) for _ in range(3))
    is_exp = single and keep_exp and settings.soft_cap is None
    for block in _blocks(slab):
        z = slab[block]
        top = z.amax(1)
        maximum[block] = top
        shift = torch.where(top <= FILL / 2, 0.0, top)[:, None]
        difference = z.sub_(shift) if is_exp else z - shift
        exponential = difference.exp()
        torch.sum(exponential, 1, out=total[block])
        moment[block] = torch.bmm(difference[:, None], exponential[:, :, None])[:, 0, 0]
        if is_exp:
            z.copy_(exponential)
        elif not single:
            torch.sum(difference.div_(settings.temperature).exp_(), 1, out=total_t[block])
    empty = maximum <= FILL / 2
    shift = torch.where(empty, 0.0, maximum)
    log_rest = torch.where(empty, -math.inf, shift + total.log())
    log_rest_t = log_rest
    if not single:
        log_rest_t = torch.where(empty, -math.inf, shift / settings.temperature + total_t.log())
    mean_rest = torch.where(empty, 0.0, shift + moment / total)
    row_max = torch.maximum(torch.where(empty, -math.inf, maximum), fixed.amax(1))
    return RowStats(fixed, log_rest, log_rest_t, mean_rest, row_max), SlabState(position, shift, is_exp)


def row_gradient(
    slab: Tensor, state: SlabState, stats: RowStats, terms: RowTerms, fix: FixSet, settings: LossSettings
) -> Tensor:
    """Overwrites `slab` with d loss / d raw logits."""
    if state.is_exp:
        weight = (terms.dense_t + terms.dense_1) * (state.shift - stats.log_rest).exp()
        slab.mul_(weight[:, None] * settings.logit_scale)
    else:
        for block in _blocks(slab):
            _dense_block(slab[block], block, stats, terms, settings)
    value = terms.fix_grad * _slope(torch.where(fix.used, stats.fix, 0.0), settings)
    slab.view(-1)[state.position] = value[fix.used]
    return slab


def _dense_block(z: Tensor, block: slice, stats: RowStats, terms: RowTerms, settings: LossSettings) -> None:
    slope = _slope(z, settings)
    if settings.temperature == 1.0:
        weight = terms.dense_t[block] + terms.dense_1[block]
        z.sub_(stats.log_rest[block, None]).exp_().mul_(weight[:, None])
    else:
        plain = None
        if settings.plain_gradient:
            plain = (z - stats.log_rest[block, None]).exp_().mul_(terms.dense_1[block, None])
        z.div_(settings.temperature).sub_(stats.log_rest_t[block, None]).exp_()
        z.mul_(terms.dense_t[block, None])
        if plain is not None:
            z.add_(plain)
    z.mul_(slope)
