"""The row passes in plain torch: the CPU backend, and the reference of the Triton kernels.

`row_stats` streams once over a slab of raw logits, `row_gradient` overwrites it with d loss / d logits.
Both work on blocks of rows that stay in a core's cache. The fix-up columns leave the stream before it
starts, so the mass of the rest is a plain sum and never `1 - sum q`, which loses all digits when small.
"""

import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.kernels.row_terms import FixSet, RowStats, RowTerms
from potstill.kernels.settings import LossSettings

# Finite, so that (z - max) * exp(z - max) is -0 and not NaN where a column was taken out.
FILL = -1e30
BLOCK_BYTES = 2 << 20


class Form(enum.Enum):
    """What the slab holds between the passes, to spare the second one its exponentials."""

    LOGITS = enum.auto()
    EXP = enum.auto()  # exp(z - shift)
    ROOT = enum.auto()  # exp((z - shift) / 2); its square is the softmax at T = 1


@dataclass(frozen=True)
class SlabState:
    position: Tensor  # int64 [M] flat positions of the used fix-ups
    shift: Tensor  # [B]
    form: Form


def _form(settings: LossSettings, *, keep_exp: bool) -> Form:
    """A soft cap's slope needs the logits themselves; no gradient needs nothing kept."""
    forms = {1.0: Form.EXP, 2.0: Form.ROOT}
    if settings.soft_cap is not None or not keep_exp:
        return Form.LOGITS
    return forms.get(settings.temperature, Form.LOGITS)


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
    form = _form(settings, keep_exp=keep_exp)
    blocks = _blocks(slab)
    # Two buffers for all blocks: fresh memory would cost more in page faults than the arithmetic.
    first, second = (torch.empty_like(slab[blocks[0]]) for _ in range(2)) if blocks else (slab, slab)
    for block in blocks:
        z = slab[block]
        top = z.amax(1)
        maximum[block] = top
        shift = torch.where(top <= FILL / 2, 0.0, top)[:, None]
        size = z.shape[0]
        sums = _block_sums(
            z.sub_(shift) if form != Form.LOGITS else torch.sub(z, shift, out=first[:size]),
            second[:size],
            settings,
            form,
        )
        total[block], total_t[block], moment[block] = sums
    empty = maximum <= FILL / 2
    shift = torch.where(empty, 0.0, maximum)
    log_rest = torch.where(empty, -math.inf, shift + total.log())
    log_rest_t = log_rest
    if not single:
        log_rest_t = torch.where(empty, -math.inf, shift / settings.temperature + total_t.log())
    mean_rest = torch.where(empty, 0.0, shift + moment / total)
    row_max = torch.maximum(torch.where(empty, -math.inf, maximum), fixed.amax(1))
    return RowStats(fixed, log_rest, log_rest_t, mean_rest, row_max), SlabState(position, shift, form)


def _block_sums(
    difference: Tensor, buffer: Tensor, settings: LossSettings, form: Form
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of exp(d), exp(d / T) and d exp(d) per row; turns `difference` d into the form to keep."""
    temperature = settings.temperature
    if temperature == 2.0:
        # One exponential serves both temperatures: exp(d) is the square of exp(d / 2).
        torch.mul(difference, 0.5, out=buffer).exp_()
        total_t = buffer.sum(1)
        moment = difference.mul_(buffer).mul_(buffer).sum(1)
        total = torch.mul(buffer, buffer, out=difference).sum(1)
    else:
        torch.exp(difference, out=buffer)
        total = total_t = buffer.sum(1)
        if temperature == 1.0:
            moment = difference.mul_(buffer).sum(1)
        else:
            moment = buffer.mul_(difference).sum(1)
            total_t = difference.div_(temperature).exp_().sum(1)
    if form != Form.LOGITS:
        difference.copy_(buffer)
    return total, total_t, moment


def row_gradient(
    slab: Tensor, state: SlabState, stats: RowStats, terms: RowTerms, fix: FixSet, settings: LossSettings
) -> Tensor:
    """Overwrites `slab` with d loss / d raw logits."""
    scale = settings.logit_scale
    if state.form == Form.EXP:
        weight = (terms.dense_t + terms.dense_1) * (state.shift - stats.log_rest).exp()
        slab.mul_(weight[:, None] * scale)
    elif state.form == Form.ROOT:
        weight_t = terms.dense_t * (state.shift / 2 - stats.log_rest_t).exp() * scale
        weight_1 = terms.dense_1 * (state.shift - stats.log_rest).exp() * scale
        for block in _blocks(slab):
            z = slab[block]
            if settings.plain_gradient:
                z.mul_(torch.mul(z, weight_1[block, None]).add_(weight_t[block, None]))
            else:
                z.mul_(weight_t[block, None])
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
