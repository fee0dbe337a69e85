"""The number grids of the format: log-probabilities in 1/16 nat, tail odds in 1/12 nat, scores in 1/256 nat.

All functions are vectorised, deterministic and free of per-token Python.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from potstill.storage.rows.array_types import Float32, Int64, UInt8

VALUE_STEP = 16
ODDS_STEP = 12
ODDS_ZERO = 128
SCORE_STEP = 256
# Log weights of sampled entries have their codes 0..255 on the 1/16 grid from here down.
WEIGHT_TOP = 7.0
LEAST_LOG_WEIGHT = WEIGHT_TOP - 255 / VALUE_STEP

_LOG_TABLE = (np.arange(256) / -VALUE_STEP).astype(np.float32)
_LOG_TABLE[0] = 0.0
_TAIL_TABLE = _LOG_TABLE.copy()
_TAIL_TABLE[255] = -np.inf
_ENTROPY_TABLE = (np.arange(256) / VALUE_STEP).astype(np.float32)
_odds = (np.arange(256) - ODDS_ZERO) / ODDS_STEP
_ODDS_TABLE = -np.logaddexp(0.0, -_odds).astype(np.float32)
_ODDS_TABLE[0] = -np.inf


def encode_gaps(logprobs: Float32, offsets: Int64) -> UInt8:
    """Descending log-probabilities of each token -> u8 steps of 1/16 nat down from the value before (first: from 0).

    A step above 255 (15.9 nats) saturates and the next steps catch up, so that later values stay exact.
    """
    # Logs are at most 1e-3, so rounding never goes below 0.
    scaled = np.multiply(logprobs, np.float32(-VALUE_STEP))
    np.rint(scaled, out=scaled)
    np.minimum(scaled, 1 << 20, out=scaled)
    codes = scaled.astype(np.int32)
    gaps = np.empty_like(codes)
    if not codes.size:
        return gaps.astype(np.uint8)
    gaps[0] = codes[0]
    np.subtract(codes[1:], codes[:-1], out=gaps[1:])
    starts = offsets[:-1][offsets[1:] > offsets[:-1]]
    gaps[starts] = codes[starts]
    if int(gaps.max()) > 255:
        tokens = np.unique(np.searchsorted(offsets, np.flatnonzero(gaps > 255), side="right") - 1)
        for token in tokens:
            span = slice(int(offsets[token]), int(offsets[token + 1]))
            ramp = 255 * np.arange(1, span.stop - span.start + 1)
            reachable = ramp + np.minimum.accumulate(np.minimum(codes[span] - ramp, 0))
            gaps[span] = np.diff(reachable, prepend=0)
    return gaps.astype(np.uint8)


def decode_gaps(gaps: UInt8, counts: UInt8, offsets: Int64) -> Float32:
    """Inverse of encode_gaps; sums wrap modulo 2^32, which cancels inside a token."""
    sums = np.cumsum(gaps, dtype=np.uint32)
    if not gaps.size:
        return np.zeros(0, np.float32)
    filled = counts > 0
    starts = offsets[:-1][filled]
    before = sums[starts] - gaps[starts]
    sums -= np.repeat(before, counts[filled])
    values = sums.view(np.int32).astype(np.float32)
    values *= np.float32(-1.0 / VALUE_STEP)
    return values


def encode_weights(values: Float32, offsets: Int64) -> UInt8:
    """Log weights on the grid, heaviest first in each token -> u8 steps of 1/16 nat down (first: from WEIGHT_TOP).

    Exact: `check_grid_weights` lets only values of the grid pass, because rounding here would move their mean.
    """
    return encode_gaps(values - np.float32(WEIGHT_TOP), offsets)


def decode_weights(gaps: UInt8, counts: UInt8, offsets: Int64) -> Float32:
    """Inverse of encode_weights."""
    return decode_gaps(gaps, counts, offsets) + np.float32(WEIGHT_TOP)


def encode_log(values: Float32) -> UInt8:
    """Log-probabilities on the absolute grid, saturating at 255/16 nats."""
    return _codes(values * np.float32(-VALUE_STEP), 255)


def decode_log(codes: UInt8) -> Float32:
    return _LOG_TABLE.take(codes)


def encode_tail(log_tail: Float32) -> UInt8:
    """As encode_log, with 255 kept for `no tail` (-inf); the smallest tail is e^(-254/16)."""
    codes = _codes(np.where(np.isneginf(log_tail), np.float32(0), log_tail) * np.float32(-VALUE_STEP), 254)
    codes[np.isneginf(log_tail)] = 255
    return codes


def decode_tail(codes: UInt8) -> Float32:
    return _TAIL_TABLE.take(codes)


def encode_entropy(values: Float32) -> UInt8:
    """Entropies in nats on the 1/16 grid, saturating at 255/16."""
    return _codes(values * np.float32(VALUE_STEP), 255)


def decode_entropy(codes: UInt8) -> Float32:
    return _ENTROPY_TABLE.take(codes)


def encode_odds(log_tail: Float32, counts: UInt8) -> UInt8:
    """Tail mass as log-odds against the kept mass: near 0 or 1 an absolute grid of log mass would lose the odds."""
    value = log_tail.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        odds = value - np.log(-np.expm1(np.minimum(value, 0.0)))
    odds = np.nan_to_num(odds, nan=1e6, posinf=1e6, neginf=-1e6)
    codes = np.clip(np.rint(odds * ODDS_STEP) + ODDS_ZERO, 1, 255).astype(np.uint8)
    codes[np.isneginf(log_tail) | (counts == 0)] = 0
    return codes


def decode_odds(codes: UInt8, counts: UInt8) -> Float32:
    values = _ODDS_TABLE.take(codes)
    values[counts == 0] = 0.0
    return values


def encode_fine(values: Float32) -> tuple[UInt8, UInt8]:
    """Non-negative nats on the 1/256 grid as low and high byte planes, saturating at 65535/256."""
    codes = np.clip(np.rint(values.astype(np.float64) * SCORE_STEP), 0, 65535).astype(np.uint16)
    return (codes & 255).astype(np.uint8), (codes >> 8).astype(np.uint8)


def decode_fine(low: UInt8, high: UInt8) -> Float32:
    codes = (high.astype(np.uint16) << 8) | low
    return codes.astype(np.float32) * np.float32(1.0 / SCORE_STEP)


def encode_rank(rank: NDArray[np.int32]) -> UInt8:
    """Label ranks, saturating at 255."""
    return np.minimum(rank, 255).astype(np.uint8)


def _codes(scaled: Float32, top: int) -> UInt8:
    return np.clip(np.rint(scaled), 0, top).astype(np.uint8)
