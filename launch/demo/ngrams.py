"""Losses of a unigram and a bigram model: lines to hold a trained model's held-out loss against.

Both are counted on the tokens that the models are trained on, and measured on the positions that the models are
measured on: every token of a held-out row but the first one of each document in it. Pure functions of arrays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class NgramLosses:
    """Mean negative log-probability in nats over `positions` held-out tokens."""

    unigram: float
    bigram: float
    positions: int


def pairs(rows: Iterable[tuple[NDArray[np.int32], NDArray[np.int32]]]) -> tuple[Int64, Int64]:
    """(token before, token) of every labelled position, from rows of (tokens [n], doc_lens [d], sum n); [N] each."""
    before, after = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for tokens, doc_lens in rows:
        inside = np.ones(len(tokens), bool)
        inside[np.cumsum(doc_lens)[:-1]] = False  # first token of a document: nothing before it predicts it
        inside[0] = False
        here = np.flatnonzero(inside)
        before.append(tokens[here - 1].astype(np.int64))
        after.append(tokens[here].astype(np.int64))
    return np.concatenate(before), np.concatenate(after)


def unigram_probabilities(after: Int64, *, vocab_size: int) -> Float64:
    """(count + 1) / (N + V) of every token [V]."""
    counts = np.bincount(after, minlength=vocab_size).astype(np.float64)
    return (counts + 1.0) / (len(after) + vocab_size)


def ngram_losses(train: tuple[Int64, Int64], heldout: tuple[Int64, Int64], *, vocab_size: int) -> NgramLosses:
    """Count on `train`, measure on `heldout` (both from `pairs`).

    The bigram is interpolated with the unigram by Witten and Bell's rule (1991, method C):
    p(w | v) = (c(v, w) + T(v) p1(w)) / (c(v) + T(v)), T(v) the number of different tokens seen after v; p1 where v was
    never seen. Raises ValueError: nothing to measure on.
    """
    (before, after), (heldout_before, heldout_after) = train, heldout
    if len(heldout_after) == 0:
        raise ValueError("the held-out rows hold no position with a label")
    single = unigram_probabilities(after, vocab_size=vocab_size)[heldout_after]
    seen, counts = np.unique(before * vocab_size + after, return_counts=True)
    total = np.bincount(before, minlength=vocab_size).astype(np.float64)[heldout_before]
    different = np.bincount(seen // vocab_size, minlength=vocab_size).astype(np.float64)[heldout_before]
    wanted = heldout_before * vocab_size + heldout_after
    at = np.minimum(np.searchsorted(seen, wanted), max(len(seen) - 1, 0))
    count = np.where(seen[at] == wanted, counts[at], 0).astype(np.float64) if len(seen) else np.zeros(len(wanted))
    known = total > 0
    double = np.where(known, (count + different * single) / np.where(known, total + different, 1.0), single)
    return NgramLosses(
        unigram=float(-np.log(single).mean()), bigram=float(-np.log(double).mean()), positions=len(wanted)
    )
