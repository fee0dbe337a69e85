"""One pass over teacher logits in tiles of 64 ids, and what follows from the tiles exactly.

Every one of the k best ids lies in one of the k tiles with the largest maxima, so after one streaming read
only k * 64 candidates are looked at again. Sums of exp are kept per tile as well: the mass outside the
kept ids is then a sum of what was not taken, free of the cancellation in `1 - kept`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TILE = 64
# Below every logit; finite, so that (z - max) * exp(z - max) is 0 and not NaN in the padding.
FILL = -1e30
# Logits of -Inf are read as FILL; nothing else is as low.
RULED_OUT = FILL / 2
BLOCK_BYTES = 2 << 20
_LOW_BITS = 0xFFFFFFFF
_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class TileStats:
    """Per tile of a padded slab [B, n * TILE]: maximum [B, n]; for z relative to the row maximum `top` [B]:
    sums of exp(z / T) per temperature (T = 1 first) [1 + nT, B, n]; `moment` [B], the sum of z exp(z);
    `above` [B] how many logits come before the label's in the order (value down, id up)."""

    top: Tensor
    maxima: Tensor
    sums: Tensor
    moment: Tensor
    above: Tensor


def padded_width(num_ids: int) -> int:
    return -(-num_ids // TILE) * TILE


def tile_stats(slab: Tensor, label_ids: Tensor, temperatures: Sequence[float]) -> TileStats:
    """The torch twin of the Triton pass; `slab` [B, n * TILE] float32 is only read. label_ids int64 [B]."""
    num_rows, width = slab.shape
    num_tiles = width // TILE
    label_logit = slab.gather(1, label_ids[:, None])  # [B, 1]
    maxima = slab.new_empty(num_rows, num_tiles)
    sums = slab.new_empty(1 + len(temperatures), num_rows, num_tiles)
    moment = slab.new_empty(num_rows)
    above = torch.empty(num_rows, dtype=torch.int32, device=slab.device)
    rows = max(1, BLOCK_BYTES // (width * slab.element_size()))
    # One pair of buffers for all blocks: fresh memory would cost more in page faults than the arithmetic.
    buffers = slab.new_empty(2, min(rows, num_rows), width)
    for start in range(0, num_rows, rows):
        block = slice(start, start + rows)
        z = slab[block]
        difference, exponential = buffers[:, : z.shape[0]]
        best = z.unflatten(1, (num_tiles, TILE)).amax(2)
        maxima[block] = best
        above[block] = _before_label(z, label_logit[block], label_ids[block], exponential)
        # In powers of two, as the Triton pass has it: torch's exp2 takes a quarter of the time of its exp.
        torch.sub(z, best.amax(1, keepdim=True), out=difference).mul_(_LOG2E)
        torch.exp2(difference, out=exponential)
        sums[0, block] = exponential.unflatten(1, (num_tiles, TILE)).sum(2)
        moment[block] = exponential.mul_(difference).sum(1).div_(_LOG2E)
        for number, temperature in enumerate(temperatures, start=1):
            torch.div(difference, temperature, out=exponential).exp2_()
            sums[number, block] = exponential.unflatten(1, (num_tiles, TILE)).sum(2)
    return TileStats(maxima.amax(1), maxima, sums, moment, above)


def _before_label(z: Tensor, logit: Tensor, label_ids: Tensor, buffer: Tensor) -> Tensor:
    """How many of z [B, V] come before the label (int32 [B]): larger ones, and equal ones with a lower id."""
    # Ones and zeros in the float buffer: a sum of booleans would first be widened to int64.
    larger = torch.gt(z, logit, out=buffer).sum(1).int()
    equal = torch.eq(z, logit, out=buffer).sum(1)
    if bool((equal > 1).any()):
        ids = torch.arange(z.shape[1], device=z.device)
        larger += ((z == logit) & (ids < label_ids[:, None])).sum(1)
    return larger


def order_keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys whose descending order is (value down, id up), for float32 values and ids < 2^31."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0: they are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (_LOW_BITS - ids.long())


def best_tiles(maxima: Tensor, count: int) -> Tensor:
    """Tiles int64 [B, count] with the largest of maxima [B, n], ascending; ties go to the lower tile.

    The lower tile holds the lower ids, so leaving out the others is exact in the order (value down, id up).
    """
    num_tiles = maxima.shape[1]
    keys = order_keys(maxima, torch.arange(num_tiles, device=maxima.device).expand_as(maxima))
    if maxima.device.type != "cpu":
        return keys.topk(count, 1).indices.sort(1).values
    best = np.partition(keys.numpy(), num_tiles - count, axis=1)[:, num_tiles - count :]
    return torch.from_numpy(np.sort(_LOW_BITS - (best & _LOW_BITS), axis=1))


def top_in_order(values: Tensor, k: int, at_least: Tensor | None = None) -> Tensor:
    """Columns int64 [B, k] of the k largest of each row of float32 values [B, C] in the order (value down, column up).

    at_least [B]: any bound that k values of each row reach; without it the k-th value itself is looked for.
    On a GPU one selection over 64-bit keys, which needs no wait. On a CPU that and torch.topk cost several times
    more than the few keys of the values that reach the bound. NaN counts as the largest value.
    """
    num_rows, num_columns = values.shape
    if values.device.type != "cpu":
        columns = torch.arange(num_columns, device=values.device).expand_as(values)
        return order_keys(values, columns).topk(k, 1).indices
    found = values.numpy()
    if at_least is None:
        bound = np.partition(found, num_columns - k, axis=1)[:, num_columns - k, None]
    else:
        bound = at_least.numpy()[:, None]
    # Not `>=`: where the bound or a value is NaN nothing may be lost.
    flat = np.flatnonzero(~(found < bound))
    ends = np.searchsorted(flat, np.arange(0, num_rows + 1) * num_columns)
    row = np.repeat(np.arange(num_rows), np.diff(ends))
    column = flat - row * num_columns
    width = int(np.diff(ends).max(initial=k))
    keys = np.full((num_rows, width), np.iinfo(np.int64).min)
    kept = torch.from_numpy(found.reshape(-1)[flat])
    keys[row, np.arange(len(flat)) - ends[row]] = order_keys(kept, torch.from_numpy(column)).numpy()
    best = np.sort(np.partition(keys, width - k, axis=1)[:, width - k :], axis=1)[:, ::-1]
    return torch.from_numpy(_LOW_BITS - (best & _LOW_BITS))


@dataclass(frozen=True)
class BestIds:
    """The k best of each row: ids int64 [B, k], logits [B, k], and the sums of exp((z - top) / T) over all
    other ids [1 + nT, B]."""

    ids: Tensor
    logits: Tensor
    rest: Tensor


def best_ids(slab: Tensor, stats: TileStats, k: int, temperatures: Sequence[float]) -> BestIds:
    """Exact top k in the order (value down, id up), from the k best tiles."""
    num_rows, num_tiles = stats.maxima.shape
    # On a CPU the candidates of a few rows at a time, which stay in the cache.
    rows = num_rows
    if slab.device.type == "cpu":
        rows = max(1, BLOCK_BYTES // (min(k, num_tiles) * TILE * slab.element_size()))
    blocks = [slice(start, start + rows) for start in range(0, num_rows, rows)] or [slice(0, 0)]
    parts = [_best_of_rows(slab[b], stats.top[b], stats.maxima[b], stats.sums[:, b], k, temperatures) for b in blocks]
    if len(parts) == 1:
        return parts[0]
    return BestIds(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.logits for part in parts]),
        torch.cat([part.rest for part in parts], 1),
    )


def _gather_tiles(slab: Tensor, taken: Tensor) -> Tensor:
    """The tiles [B, t] of a slab [B, n * TILE], whose rows may be the front of wider ones: [B, t * TILE]."""
    num_rows, width = slab.shape
    stride = slab.stride(0) if num_rows > 1 else width
    if stride % TILE or slab.stride(1) != 1:
        return slab.unflatten(1, (-1, TILE)).take_along_dim(taken[:, :, None], 1).flatten(1)
    # Whole tiles picked from one list: several times cheaper than an index per element.
    tiles = slab.as_strided((((num_rows - 1) * stride + width) // TILE if num_rows else 0, TILE), (TILE, 1))
    first = torch.arange(num_rows, device=slab.device)[:, None] * (stride // TILE)
    return tiles.index_select(0, (first + taken).flatten()).view(num_rows, taken.shape[1] * TILE)


def _best_of_rows(
    slab: Tensor, top: Tensor, maxima: Tensor, sums: Tensor, k: int, temperatures: Sequence[float]
) -> BestIds:
    num_tiles = maxima.shape[1]
    taken = best_tiles(maxima, min(k, num_tiles))  # [B, t]
    candidates = _gather_tiles(slab, taken)  # [B, t * TILE], ids ascending
    # The maxima of k tiles are k values that reach the least of them.
    at_least = maxima.gather(1, taken).amin(1) if num_tiles >= k else None
    chosen = top_in_order(candidates, k, at_least)  # [B, k]
    ids = taken.gather(1, chosen // TILE) * TILE + chosen % TILE
    logits = candidates.gather(1, chosen)
    relative = candidates.sub_(top[:, None]).mul_(_LOG2E)
    others = torch.ones_like(maxima).scatter(1, taken, 0.0)
    rest = []
    for number, temperature in enumerate((1.0, *temperatures)):
        left = relative.exp2() if temperature == 1.0 else (relative / temperature).exp2_()
        rest.append((sums[number] * others).sum(1) + left.scatter_(1, chosen, 0.0).sum(1))
    return BestIds(ids, logits, torch.stack(rest))
