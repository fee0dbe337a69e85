"""The row passes in plain torch: the CPU backend, and the reference of the Triton kernels.

`row_stats` streams once over a slab of raw logits, `row_gradient` overwrites it with d loss / d logits. Both work on
blocks of rows that stay in a core's cache. Shapes: B rows of the slab, V logits each, F fix-up columns (the kept ids
and the label), M used fix-ups of all rows. All is in the slab's dtype: float32, or float64 for float64 inputs.

Why the numbers come out right:
- The fix-up columns leave the stream before it starts, so the mass of the rest is a plain sum of what is there. Taken
  as `1 - sum q` it would lose all digits where it is small, and its logarithm is what the rest bucket is compared by.
- The row's maximum is subtracted before any exp: no term is above 1 and the largest is 1, so a sum of V terms neither
  overflows nor underflows to 0, for any size of the logits. The maximum itself is added back to the logarithm.
- The mean of z is taken of z - max too: of z itself the terms would be as large as the logits and cancel.
- A softmax is exp(z - lse), one rounding of a difference, and not exp(z) / sum: the quotient would need both in range.
"""

import enum
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from potstill.kernels.row_terms import FixSet, RowStats, RowTerms
from potstill.kernels.settings import LossSettings
from potstill.kernels.soft_cap import cap_slope, scale_and_cap_

# Finite, so that (z - max) * exp(z - max) is -0 and not NaN where a column was taken out. The number that the Triton
# kernels take (divergences_triton.NONE), so that a logit of -inf, which is read as this, costs the same on either way.
FILL = -(2.0**100)
BLOCK_BYTES = 2 << 20


class Form(enum.Enum):
    """What the slab holds between the passes, to spare the second one its exponentials."""

    LOGITS = enum.auto()
    EXP = enum.auto()  # exp(z - shift)
    ROOT = enum.auto()  # exp((z - shift) / 2); its square is the softmax at T = 1


@dataclass(frozen=True)
class SlabState:
    """What row_stats leaves for row_gradient beside the slab."""

    position: Tensor  # int64 [M] flat positions of the used fix-ups in the slab
    shift: Tensor  # [B] what was subtracted from z: the row's maximum, 0 for a row without a rest
    form: Form


def _form(settings: LossSettings, *, keep_exp: bool) -> Form:
    """A soft cap's slope needs the logits themselves; no gradient needs nothing kept."""
    forms = {1.0: Form.EXP, 2.0: Form.ROOT}
    if settings.soft_cap is not None or not keep_exp:
        return Form.LOGITS
    return forms.get(settings.student_temperature, Form.LOGITS)


def slab_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the slab for a head of `dtype`: never below float32, which costs a CPU no more than bfloat16."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(slab: Tensor) -> list[slice]:
    """Rows of a slab [B, V] in blocks of at most BLOCK_BYTES (one row at least)."""
    rows = max(1, BLOCK_BYTES // max(1, slab.shape[1] * slab.element_size()))
    return [slice(start, start + rows) for start in range(0, slab.shape[0], rows)]


def row_stats(slab: Tensor, fix: FixSet, settings: LossSettings, *, keep_exp: bool) -> tuple[RowStats, SlabState]:
    """Statistics of the raw logits `slab` [B, V], contiguous; the slab then holds what the state's form says.

    keep_exp: whether row_gradient will follow, for which the exponentials are kept where they can be.
    """
    num_rows, vocab_size = slab.shape
    single = settings.student_temperature == 1.0
    scale, cap = settings.logit_scale, settings.soft_cap
    # A -inf logit would make (z - max) * exp(z - max) a NaN; z below FILL has probability 0 either way.
    fixed = scale_and_cap_(slab.gather(1, fix.ids), logit_scale=scale, soft_cap=cap).clamp_min_(FILL)  # [B, F]
    fixed = torch.where(fix.used, fixed, -math.inf)
    scale_and_cap_(slab, logit_scale=scale, soft_cap=cap)
    row, column = fix.used.nonzero(as_tuple=True)
    position = row * vocab_size + fix.ids[row, column]  # [M]
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
        log_rest_t = torch.where(empty, -math.inf, shift / settings.student_temperature + total_t.log())
    mean_rest = torch.where(empty, 0.0, shift + moment / total)
    row_max = torch.maximum(torch.where(empty, -math.inf, maximum), fixed.amax(1))
    return RowStats(fixed, log_rest, log_rest_t, mean_rest, row_max), SlabState(position, shift, form)


def _block_sums(
    difference: Tensor, buffer: Tensor, settings: LossSettings, form: Form
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of exp(d), exp(d / T) and d exp(d), each [b], of `difference` d [b, V]; turns d into the form to keep.

    buffer [b, V] is scratch. d <= 0, so every exponential is in (0, 1].
    A logit of -inf has d exp(d) = -inf * 0, which counts as the 0 that it is; a NaN logit shows in the other sums.
    """
    temperature = settings.student_temperature
    if temperature == 2.0:
        # One exponential serves both temperatures: exp(d) is the square of exp(d / 2).
        torch.mul(difference, 0.5, out=buffer).exp_()
        total_t = buffer.sum(1)
        moment = difference.mul_(buffer).mul_(buffer).nansum(1)
        total = torch.mul(buffer, buffer, out=difference).sum(1)
    else:
        torch.exp(difference, out=buffer)
        total = total_t = buffer.sum(1)
        if temperature == 1.0:
            moment = difference.mul_(buffer).nansum(1)
        else:
            moment = buffer.mul_(difference).nansum(1)
            total_t = difference.div_(temperature).exp_().sum(1)
    if form != Form.LOGITS:
        difference.copy_(buffer)
    return total, total_t, moment


def row_gradient(
    slab: Tensor, state: SlabState, stats: RowStats, terms: RowTerms, fix: FixSet, settings: LossSettings
) -> Tensor:
    """Overwrites `slab` [B, V], as row_stats left it, with d loss / d raw logits.

    Off the fix-ups that is a weight per row times the softmax of the rest: exp(z - shift) is there already where it was
    kept, and exp(shift - log_rest) <= 1 turns it into the softmax. The fix-ups are put in last.
    """
    scale, cap = settings.logit_scale, settings.soft_cap
    # A rest of logits of -inf alone has no sum; its exponentials are 0, and any finite number keeps them so.
    sums = {name: torch.where(lse == -math.inf, 0.0, lse) for name, lse in vars(stats).items() if "log_rest" in name}
    stats = replace(stats, **sums)
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
    value = terms.fix_grad * cap_slope(torch.where(fix.used, stats.fix, 0.0), logit_scale=scale, soft_cap=cap)  # [B, F]
    slab.view(-1)[state.position] = value[fix.used]
    return slab


def _dense_block(z: Tensor, block: slice, stats: RowStats, terms: RowTerms, settings: LossSettings) -> None:
    """The dense gradient of one block of rows z [b, V], which holds logits, in place."""
    slope = cap_slope(z, logit_scale=settings.logit_scale, soft_cap=settings.soft_cap)
    if settings.student_temperature == 1.0:
        weight = terms.dense_t[block] + terms.dense_1[block]
        z.sub_(stats.log_rest[block, None]).exp_().mul_(weight[:, None])
    else:
        plain = None
        if settings.plain_gradient:
            plain = (z - stats.log_rest[block, None]).exp_().mul_(terms.dense_1[block, None])
        z.div_(settings.student_temperature).sub_(stats.log_rest_t[block, None]).exp_()
        z.mul_(terms.dense_t[block, None])
        if plain is not None:
            z.add_(plain)
    z.mul_(slope)
