"""The store's byte planes to CSR tensors, on the device of the planes, equal to the NumPy decoder bit for bit.

A batch travels to the GPU as bytes (4 to 6 per entry) and becomes ids and log-probabilities there. This
room does not know the store: the planes come as tensors, the grids as numbers and small tables.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from potstill.kernels.types import KernelInputError, SparseTargetTensors

VALUE_STEP = 16  # log-probabilities and log weights are multiples of 1/16 nat
WEIGHT_TOP = 7.0  # the largest log weight; codes go down from it


def join_ids(planes: Sequence[Tensor], id_of_rank: Tensor | None = None) -> Tensor:
    """int32 [E] from little-endian byte planes (u8 [E] each, 2 or 3); id_of_rank int32 [V] maps ranks to ids."""
    ids = planes[-1].int()
    for plane in reversed(planes[:-1]):
        ids = (ids << 8) | plane
    return ids if id_of_rank is None else id_of_rank[ids.long()]


def decode_gaps(gaps: Tensor, offsets: Tensor) -> Tensor:
    """float32 [E] descending log-probabilities from u8 steps down (the first of a token from 0).

    One running sum over all entries less the sum before each token, in integers: exact for any length.
    """
    sums = torch.cumsum(gaps, 0, dtype=torch.int64)
    counts = offsets.diff()
    padded = torch.nn.functional.pad(sums, (1, 0))  # padded[i] = sum of the first i gaps
    before = torch.repeat_interleave(padded[offsets[:-1]], counts, output_size=gaps.shape[0])
    return (sums - before).int().float() * (-1.0 / VALUE_STEP)


def expand_targets(
    *,
    count: Tensor,
    id_planes: Sequence[Tensor],
    gaps: Tensor | None,
    draws: Tensor | None = None,
    weights: Tensor | None = None,
    num_draws: int | None = None,
    tail: Tensor,
    tail_table: Tensor,
    tails_at: Mapping[float, Tensor] | None = None,
    odds_table: Tensor | None = None,
    id_of_rank: Tensor | None = None,
    max_entries: int | None = None,
) -> SparseTargetTensors:
    """CSR targets of N tokens and E entries from u8 planes: count [N], ids, gaps [E] (or draws, or weights), tail [N].

    tail_table, odds_table: float32 [256], the value of each code (the store's grids); tails_at: temperature
    -> u8 [N], read through odds_table, 0.0 where a token has no entries. max_entries: a bound of `count`.
    """
    if sum(plane is not None for plane in (gaps, draws, weights)) != 1:
        raise KernelInputError("exactly one of gaps, draws and weights is a column of a store; expected one of them")
    if tails_at and odds_table is None:
        raise KernelInputError("tails_at is given without odds_table, the values of its codes")
    planes = {"count": count, "tail": tail, "ids": id_planes[0], "gaps": gaps, "weights": weights}
    for name, plane in planes.items():
        if plane is not None and plane.dtype != torch.uint8:
            raise KernelInputError(f"plane {name} has dtype {plane.dtype}; expected uint8")
    offsets = torch.zeros(count.shape[0] + 1, dtype=torch.int64, device=count.device)
    torch.cumsum(count, 0, out=offsets[1:])
    empty = count == 0
    log_tail_at = {
        t: torch.where(empty, 0.0, odds_table[codes.long()])
        for t, codes in (tails_at or {}).items()
        if odds_table is not None
    }
    return SparseTargetTensors(
        offsets=offsets,
        ids=join_ids(id_planes, id_of_rank),
        logprobs=None if gaps is None else decode_gaps(gaps, offsets),
        counts=None if draws is None else draws.float(),
        num_draws=num_draws,
        log_tail=tail_table[tail.long()],
        log_tail_at=log_tail_at,
        max_entries=255 if max_entries is None else max_entries,
        log_weights=None if weights is None else decode_gaps(weights, offsets) + WEIGHT_TOP,
    )
