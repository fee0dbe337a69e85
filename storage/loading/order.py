"""Row order as a pure function: a keyed Feistel bijection evaluated only where it is needed, O(1) memory.

ORDER_VERSION 1 is pinned by a golden list in the tests; a change of any bit needs a new version number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from potstill.storage.errors import StoreError

ORDER_VERSION = 1
ROUNDS = 6
RUN_ROWS = 16
WINDOW_RUNS = 256
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xD6E8FEB86659FD93)
_MASK64 = (1 << 64) - 1

Int64 = NDArray[np.int64]


def permute(index: ArrayLike, n: int, *, seed: int, epoch: int, stream: int = 0) -> Int64:
    """Bijection of [0, n) evaluated at `index`: a 6-round Feistel network with cycle walking, keyed by the rest.

    Luby and Rackoff, "How to construct pseudorandom permutations" (1988); cycle walking after Black and Rogaway,
    "Ciphers with arbitrary finite domains" (2002). Raises StoreError for an index outside [0, n).
    """
    values = np.array(index, dtype=np.int64, copy=True)
    if values.size and (int(values.min()) < 0 or int(values.max()) >= n):
        raise StoreError(f"order: index {int(values.min())}..{int(values.max())} is not in [0, {n})")
    if n <= 1 or not values.size:
        return values
    half = (int(n - 1).bit_length() + 1) // 2
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    keys = [_key(seed, epoch, stream, r) for r in range(ROUNDS)]
    flat = values.reshape(-1).astype(np.uint64)
    out = _rounds(flat, keys, shift, mask)
    walking = np.flatnonzero(out >= n)
    while walking.size:
        out[walking] = _rounds(out[walking], keys, shift, mask)
        walking = walking[out[walking] >= n]
    return out.astype(np.int64).reshape(values.shape)


def _rounds(x: NDArray[np.uint64], keys: list[np.uint64], shift: np.uint64, mask: np.uint64) -> NDArray[np.uint64]:
    left, right = x >> shift, x & mask
    for key in keys:
        f = (right + key) * _GOLDEN
        f ^= f >> np.uint64(32)
        f *= _MIX
        f ^= f >> np.uint64(29)
        left, right = right, left ^ (f & mask)
    return (left << shift) | right


def _key(seed: int, epoch: int, stream: int, round_number: int) -> np.uint64:
    """One round key: a 64-bit mix of all four numbers, in plain integers modulo 2^64."""
    x = 0
    for part in (seed, epoch, stream, round_number):
        x = (x + (part & _MASK64) + int(_GOLDEN)) & _MASK64
        for _ in range(2):
            x = ((x ^ (x >> 32)) * int(_MIX)) & _MASK64
        x ^= x >> 32
    return np.uint64(x)


@dataclass(frozen=True)
class RowOrder:
    """Order of `num_rows` rows in every epoch.

    Modes: `global` (any row anywhere), `block` (runs of 16 neighbouring rows are shuffled, then rows inside windows
    of 256 runs: sequential reads, bounded working set), `sequential`.
    """

    num_rows: int
    seed: int
    mode: str = "global"
    stream: int = 0

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise StoreError(f"order: mode is {self.mode!r}, expected one of {sorted(_MODES)}")
        if self.num_rows < 0:
            raise StoreError(f"order: {self.num_rows} rows")

    def rows(self, epoch: int, positions: ArrayLike) -> Int64:
        """Row numbers at `positions` of `epoch`; same shape as `positions`."""
        return _MODES[self.mode](self, epoch, np.asarray(positions, np.int64))

    def endless(self, positions: Int64) -> Int64:
        """Row numbers at positions [n] that run on through the epochs."""
        epochs = positions // self.num_rows
        found = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self.rows(int(epoch), positions[here] % self.num_rows)
        return found


def _sequential(order: RowOrder, epoch: int, positions: Int64) -> Int64:
    if positions.size and (int(positions.min()) < 0 or int(positions.max()) >= order.num_rows):
        raise StoreError(f"order: positions outside [0, {order.num_rows})")
    return positions.copy()


def _global(order: RowOrder, epoch: int, positions: Int64) -> Int64:
    return permute(positions, order.num_rows, seed=order.seed, epoch=epoch, stream=2 * order.stream)


def _block(order: RowOrder, epoch: int, positions: Int64) -> Int64:
    n, window = order.num_rows, RUN_ROWS * WINDOW_RUNS
    num_runs = n // RUN_ROWS
    flat = _sequential(order, epoch, positions).reshape(-1)
    out = np.empty_like(flat)
    for number in np.unique(flat // window):
        here = flat // window == number
        low = int(number) * window
        # Streams of windows are odd and above 2^32, so that they never meet those of the runs.
        stream = ((order.stream << 40) + int(number) + (1 << 32)) * 2 + 1
        inner = low + permute(flat[here] - low, min(window, n - low), seed=order.seed, epoch=epoch, stream=stream)
        run, inside = inner // RUN_ROWS, inner % RUN_ROWS
        whole = run < num_runs
        moved = inner.copy()
        moved[whole] = (
            permute(run[whole], num_runs, seed=order.seed, epoch=epoch, stream=2 * order.stream) * RUN_ROWS
            + inside[whole]
        )
        out[here] = moved
    return out.reshape(positions.shape)


_MODES: dict[str, Callable[[RowOrder, int, Int64], Int64]] = {
    "sequential": _sequential,
    "global": _global,
    "block": _block,
}
