"""Sampled targets: n draws per token from the teacher's whole distribution, as ids with draw counts.

Random-sampling KD (Sparse Logit Sampling, arXiv 2503.16870): counts / n is unbiased for every id, and 50
draws touch about a dozen ids. A draw is an inverse-CDF look-up: first the tile by the sums of the
tiles, then the id inside it, so that the row is streamed once for any number of draws.
"""

import torch
from torch import Tensor

from potstill.kernels.counter_random import uniforms
from potstill.kernels.teacher_rows import TeacherChunk
from potstill.kernels.tiles import TILE
from potstill.kernels.types import SparseTargetTensors


def draw_ids(chunk: TeacherChunk, *, seed: int, rows: Tensor, positions: Tensor, num_draws: int) -> Tensor:
    """Drawn ids int64 [B, num_draws] from softmax(z) of each row of the chunk."""
    sums = chunk.stats.sums[0].double()  # [B, n]
    ends = sums.cumsum(1)
    u = uniforms(seed=seed, rows=rows, positions=positions, num_draws=num_draws) * ends[:, -1:]
    # Rounding can put u on the very end; the last tile with any mass is then the one.
    last = (sums > 0).long().cumsum(1).argmax(1, keepdim=True)
    tile = torch.minimum(torch.searchsorted(ends, u, right=True), last)  # [B, d]
    start = (ends - sums).gather(1, tile)
    members = tile[:, :, None] * TILE + torch.arange(TILE, device=tile.device)  # [B, d, TILE]
    logits = chunk.slab.gather(1, members.flatten(1)).view(members.shape)
    weights = (logits - chunk.stats.top[:, None, None]).double().exp()
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


def as_targets(
    entries: Tensor, ids: Tensor, counts: Tensor, *, log_tail: Tensor, num_draws: int
) -> SparseTargetTensors:
    offsets = torch.zeros(entries.shape[0] + 1, dtype=torch.int64, device=entries.device)
    torch.cumsum(entries, 0, out=offsets[1:])
    return SparseTargetTensors(
        offsets=offsets,
        ids=ids,
        logprobs=None,
        counts=counts,
        num_draws=num_draws,
        log_tail=log_tail,
        max_entries=num_draws,
    )
