"""Sampled targets: n draws per token from a power of the teacher's distribution, as ids with counts or weights.

Random-sampling KD (Sparse Logit Sampling, arXiv 2503.16870): counts / n is unbiased for every id, and 50
draws touch about a dozen ids. A draw is an inverse-CDF look-up: first the tile by the sums of the
tiles, then the id inside it, so that the row is streamed once for any number of draws.

With the proposal pi ~ p^power the unbiased estimate of p is t = (count / n) p / pi. The store keeps ln t on
a grid of 1/16 nat; it is put there by stochastic rounding, so that the mean of the stored weight is t itself.
"""

import math

import torch
from torch import Tensor

from potstill.kernels.counter_random import uniforms, uniforms_of_ids
from potstill.kernels.teacher_rows import TeacherChunk
from potstill.kernels.tiles import TILE
from potstill.kernels.types import SparseTargetTensors

# The grid of a store (storage/rows/value_grid.py has the same numbers): ln t = WEIGHT_TOP - code / VALUE_STEP.
VALUE_STEP = 16
WEIGHT_TOP = 7.0
LAST_CODE = 255  # the least weight that a store holds is exp(WEIGHT_TOP - 255 / 16)


def draw_ids(chunk: TeacherChunk, *, seed: int, rows: Tensor, positions: Tensor, num_draws: int) -> Tensor:
    """Drawn ids int64 [B, num_draws] from softmax(z / T) of each row, T the chunk's last temperature (or 1)."""
    temperature = (1.0, *chunk.temperatures)[-1]
    sums = chunk.stats.sums[-1].double()  # [B, n]
    ends = sums.cumsum(1)
    u = uniforms(seed=seed, rows=rows, positions=positions, num_draws=num_draws) * ends[:, -1:]
    # Rounding can put u on the very end; the last tile with any mass is then the one.
    last = (sums > 0).long().cumsum(1).argmax(1, keepdim=True)
    tile = torch.minimum(torch.searchsorted(ends, u, right=True), last)  # [B, d]
    start = (ends - sums).gather(1, tile)
    members = tile[:, :, None] * TILE + torch.arange(TILE, device=tile.device)  # [B, d, TILE]
    logits = chunk.slab.gather(1, members.flatten(1)).view(members.shape)
    weights = ((logits - chunk.stats.top[:, None, None]) / temperature).double().exp()
    inner = weights.cumsum(2)
    last = (weights > 0).long().cumsum(2).argmax(2)
    place = (inner <= (u - start)[:, :, None]).sum(2)
    return tile * TILE + torch.minimum(place, last)


def count_draws(ids: Tensor, valid: Tensor | None, *, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(entries per token [N], ids int32 [E], draw counts float32 [E]); most drawn first, then lowest id."""
    num_tokens, num_draws = ids.shape
    token = torch.arange(num_tokens, device=ids.device)[:, None]
    flat = (token * vocab_size + ids).flatten() if valid is None else (token * vocab_size + ids)[valid].flatten()
    keys, counts = torch.unique(flat, return_counts=True)  # sorted
    owner = keys // vocab_size
    order = torch.argsort(owner * (num_draws + 1) + (num_draws - counts), stable=True)
    entries = torch.bincount(owner, minlength=num_tokens)
    return entries, (keys % vocab_size)[order].int(), counts[order].float()


def log_ratios(chunk: TeacherChunk, token: Tensor, ids: Tensor) -> Tensor:
    """ln(p / pi) float64 [E] of ids (int64 [E]) of the chunk's rows `token`: p at T = 1, pi at the last T."""
    totals = chunk.stats.sums.double().sum(2).log()  # [1 + nT, B]
    below = chunk.slab[token, ids].double() - chunk.stats.top[token].double()
    temperature = (1.0, *chunk.temperatures)[-1]
    return below - below / temperature - totals[0, token] + totals[-1, token]


def importance_log_weights(log_ratio: Tensor, counts: Tensor, *, num_draws: int) -> Tensor:
    """ln t, t = (count / num_draws) p / pi, float64 [E]: E[t] = p for every id, drawn or not."""
    return log_ratio + counts.double().log() - math.log(num_draws)


def grid_choice(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """(code int64, probability float64) of each ln t: the code is taken with it, else the next one down.

    A code stands for exp(WEIGHT_TOP - code / 16), and the two weights have the mean t. Below the last code
    the choice is between that code and nothing (LAST_CODE + 1), with the same mean. Above the grid, codes
    are negative: no store holds them.
    """
    place = (WEIGHT_TOP - log_weights) * VALUE_STEP
    code = place.floor()
    step = 1 / VALUE_STEP
    upper = torch.special.expm1((1 - (place - code)) * step) / math.expm1(step)
    beyond = place > LAST_CODE
    upper = torch.where(beyond, ((LAST_CODE - place) * step).exp(), upper)
    return torch.where(beyond, float(LAST_CODE), code).long(), upper


def round_to_grid(log_weights: Tensor, u: Tensor, token: Tensor, *, num_tokens: int) -> tuple[Tensor, Tensor]:
    """(codes int64 [E], kept bool [E]) of ln t by uniforms u in (0, 1); see `grid_choice`.

    A token whose weights would all be dropped keeps its heaviest at the last code, because no entries means
    no target: that is above its mean, by less than the least weight of a store.
    """
    code, upper = grid_choice(log_weights)
    code = code + (u >= upper)
    kept = code <= LAST_CODE
    some = torch.zeros(num_tokens, dtype=torch.int64, device=token.device).index_add_(0, token, kept.long()) > 0
    least = torch.full((num_tokens,), -math.inf, dtype=log_weights.dtype, device=token.device)
    heaviest = least.scatter_reduce(0, token, log_weights, "amax")[token]
    return code.clamp_max(LAST_CODE), kept | (~some[token] & (log_weights == heaviest))


def order_by_code(token: Tensor, codes: Tensor, ids: Tensor) -> Tensor:
    """Order of entries int64 [E]: by token, weight down, id up."""
    by_id = torch.argsort(ids, stable=True)
    by_code = by_id[torch.argsort(codes[by_id], stable=True)]
    return by_code[torch.argsort(token[by_code], stable=True)]


def weigh_draws(
    chunk: TeacherChunk,
    entries: Tensor,
    ids: Tensor,
    counts: Tensor,
    *,
    seed: int,
    rows: Tensor,
    positions: Tensor,
    num_draws: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(entries per token, ids, log weights float32 on the store's grid) of counted draws of one chunk.

    entries int64 [B], ids int32 [E] and counts float32 [E] as from `count_draws`; rows, positions int64 [B].
    """
    num_tokens = entries.shape[0]
    token = torch.repeat_interleave(torch.arange(num_tokens, device=ids.device), entries)
    wide = ids.long()
    log_weights = importance_log_weights(log_ratios(chunk, token, wide), counts, num_draws=num_draws)
    u = uniforms_of_ids(seed=seed, rows=rows[token], positions=positions[token], ids=wide)
    codes, kept = round_to_grid(log_weights, u, token, num_tokens=num_tokens)
    token, wide, codes = token[kept], wide[kept], codes[kept]
    order = order_by_code(token, codes, wide)
    values = WEIGHT_TOP - codes[order].double() / VALUE_STEP
    return torch.bincount(token, minlength=num_tokens), wide[order].int(), values.float()


def as_targets(
    entries: Tensor, ids: Tensor, values: Tensor, *, weighted: bool, log_tail: Tensor, num_draws: int
) -> SparseTargetTensors:
    """CSR targets of draws from entries int64 [N], ids int32 [E], values float32 [E]: counts, or log weights."""
    offsets = torch.zeros(entries.shape[0] + 1, dtype=torch.int64, device=entries.device)
    torch.cumsum(entries, 0, out=offsets[1:])
    return SparseTargetTensors(
        offsets=offsets,
        columns={"ids": ids, "log_weights" if weighted else "counts": values, "log_tail": log_tail},
        num_draws=num_draws,
        max_entries=num_draws,
    )
