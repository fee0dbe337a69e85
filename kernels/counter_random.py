"""Random numbers that are a pure function of (seed, row, position, draw), the same bits on any device.

Philox 4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011) in plain int64 tensor
operations. A draw does not depend on the batch, the rank or the order of the rows.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10


def _multiply(factor: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of factor * value, in halves: the whole product does not fit a signed int64."""
    low_half, high_half = value & 0xFFFF, value >> 16
    low, high = factor * low_half, factor * high_half  # each below 2^48
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four words of 32 bits (in int64) for each counter of four such words (broadcast together)."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniforms(*, seed: int, rows: Tensor, positions: Tensor, num_draws: int) -> Tensor:
    """[N, num_draws] float64 in (0, 1), multiples of 2^-32 plus 2^-33, for tokens (rows[n], positions[n]).

    seed: any integer; rows int64 [N] >= 0; positions int64 [N], 0 .. 2^32 - 1.
    """
    key = (seed & _MASK, (seed >> 32) & _MASK)
    groups = torch.arange(-(-num_draws // 4), device=rows.device)
    counter = (
        groups[None, :],
        (positions & _MASK)[:, None],
        (rows & _MASK)[:, None],
        (rows >> 32)[:, None],
    )
    words = torch.stack(philox(counter, key), -1).flatten(1)[:, :num_draws]
    return (words.double() + 0.5) * 2.0**-32


def uniforms_of_ids(*, seed: int, rows: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """[E] float64 in (0, 1) as in `uniforms`, one per entry (rows[e], positions[e], ids[e]); free of all draws.

    ids: int64 [E], 0 .. 2^31 - 1. The counters of the draws stay below 2^31, those of ids begin there.
    """
    key = (seed & _MASK, (seed >> 32) & _MASK)
    counter = (ids | (1 << 31), positions & _MASK, rows & _MASK, rows >> 32)
    return (philox(counter, key)[0].double() + 0.5) * 2.0**-32
