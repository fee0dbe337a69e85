"""One pass over teacher logits in tiles of 64 ids, and what follows from the tiles exactly.

Every one of the k best ids lies in one of the k tiles with the largest maxima, so after one streaming read
only k * 64 candidates are looked at again. Sums of exp are kept per tile as well: the mass outside the
kept ids is then a sum of what was not taken, free of the cancellation in `1 - kept`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 64
# Below every logit; finite, so that (z - max) * exp(z - max) is 0 and not NaN in the padding.
FILL = -1e30
BLOCK_BYTES = 2 << 20


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
        torch.sub(z, best.amax(1, keepdim=True), out=difference)
        torch.exp(difference, out=exponential)
        sums[0, block] = exponential.unflatten(1, (num_tiles, TILE)).sum(2)
        moment[block] = exponential.mul_(difference).sum(1)
        for number, temperature in enumerate(temperatures, start=1):
            torch.div(difference, temperature, out=exponential).exp_()
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
    return (ordered.long() << 32) | (0xFFFFFFFF - ids.long())


def top_in_order(values: Tensor, k: int) -> Tensor:
    """Columns int64 [B, k] of the k largest of each row of float32 values [B, C] in the order (value down, column up).

    On a GPU one selection over 64-bit keys, which needs no wait. On a CPU selecting floats is several times cheaper;
    only rows where more values than fit are equal to the k-th one are selected again by keys.
    """
    if values.device.type != "cpu":
        return _top_by_keys(values, k)
    picked_values, picked = values.topk(k, 1)
    last = picked_values[:, -1:]
    undecided = torch.eq(values, last).float().sum(1) > (picked_values == last).sum(1)
    rows = undecided.nonzero()[:, 0]
    if len(rows):
        picked[rows] = _top_by_keys(values[rows], k)
    picked = picked.sort(1).values
    order = values.gather(1, picked).argsort(dim=1, descending=True, stable=True)
    return picked.gather(1, order)


def _top_by_keys(values: Tensor, k: int) -> Tensor:
    columns = torch.arange(values.shape[1], device=values.device).expand_as(values)
    return order_keys(values, columns).topk(k, 1).indices


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
    tile_ids = torch.arange(num_tiles, device=slab.device).expand(num_rows, -1)
    num_taken = min(k, num_tiles)
    # Ties between tile maxima go to the lower tile, which holds the lower ids: the pruning stays exact.
    taken = order_keys(stats.maxima, tile_ids).topk(num_taken, 1).indices.sort(1).values  # [B, t]
    rows = torch.arange(num_rows, device=slab.device)[:, None]
    candidates = slab.unflatten(1, (num_tiles, TILE))[rows, taken].flatten(1)  # [B, t * TILE], ids ascending
    chosen = top_in_order(candidates, k)  # [B, k]
    ids = taken.gather(1, chosen // TILE) * TILE + chosen % TILE
    logits = candidates.gather(1, chosen)
    left = (candidates - stats.top[:, None]).scatter(1, chosen, FILL)
    others = torch.ones_like(stats.maxima).scatter(1, taken, 0.0)
    rest = [
        (stats.sums[number] * others).sum(1) + (left / temperature).exp().sum(1)
        for number, temperature in enumerate((1.0, *temperatures))
    ]
    return BestIds(ids, logits, torch.stack(rest))
