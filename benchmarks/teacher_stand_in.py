"""A seeded stand-in teacher for the storage benchmarks: next-token distributions over V ids without any data.

Each position mixes three parts, as an interpolated n-gram model over text does: a few continuations that its
context has seen (drawn from the unigram, with skewed weights), a broader topic, and the Zipf-Mandelbrot unigram itself;
a low-rank Gaussian term on the logits stands in for the tails of a neural network. A temperature is solved so that the
mean entropy meets a target. Token ids follow frequency only roughly (a merge order with noise), as real tokenizers do.
Neighbouring positions share topic and low-rank state.

The constants were fitted by hand to figures of n-gram and small neural teachers on real text: mass in the top
8/32/128 about .80/.90/.95 at 2.1 nats, 42-45 entries at top-p .95 with k <= 100 (18-22 at 1.4 nats), 5 and 13 distinct
ids in 12 and 50 draws, k=64 planes of about 126 B/token at V=32000 and 130 at V=128256, frequency ranks 8% less.
`calibration` prints what came out; it keeps more mass in the top 8 and 3% more id bytes at V=128256.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOP = 128
CHUNK = 64
RANK = 32
TOPIC = 300
FLOOR = 0.5
KNOWN_A = 2.5
KNOWN_B = 0.33
NOISE = 1.1
# (largest vocabulary, Zipf exponent, noise of the id order): larger tokenizers keep closer to merge order.
VOCAB_SHAPES = ((65_536, 1.05, 2.2), (1 << 24, 1.1, 1.5))
NUM_DRAWS = (12, 50)


@dataclass(frozen=True)
class Dump:
    """Top-128 log-probabilities of N positions at one entropy, and what a dump keeps besides."""

    vocab_size: int
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    entropy: NDArray[np.float32]
    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    label_logprob: NDArray[np.float32]
    label_rank: NDArray[np.int32]
    draws: dict[int, tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.uint8]]]
    unigram: NDArray[np.float64]


def calibration(dump: Dump) -> dict[str, float]:
    """Shape figures to compare with real dumps: entropy, mass in the top 8/32/128, entries at top-p .95, unique ids."""
    mass = np.exp(dump.logprobs.astype(np.float64)).cumsum(1)
    kept = np.minimum((mass < 0.95).sum(1) + 1, 100)
    unique = {f"unique_{n}": float(np.diff(dump.draws[n][0]).mean()) for n in dump.draws}
    return {
        "entropy": float(dump.entropy.mean()),
        "top1": float(mass[:, 0].mean()),
        "top8": float(mass[:, 7].mean()),
        "top32": float(mass[:, 31].mean()),
        "top128": float(mass[:, 127].mean()),
        "kept_mean": float(kept.mean()),
        "kept_median": float(np.median(kept)),
        **unique,
    }


def make_dumps(
    vocab_size: int, entropies: tuple[float, ...], *, positions: int = 8192, seed: int = 0
) -> dict[float, Dump]:
    """One dump per target entropy; all share contexts and logits and differ by temperature only."""
    model = _Model(vocab_size, seed)
    sample = np.concatenate([logits for _, logits in model.chunks(8 * CHUNK, seed + 1)])
    temperatures = {h: _solve_temperature(sample, h) for h in entropies}
    rng = np.random.default_rng(seed + 2)
    parts: dict[float, list[tuple[NDArray, ...]]] = {h: [] for h in entropies}
    draws: dict[float, dict[int, list]] = {h: {n: [] for n in NUM_DRAWS} for h in entropies}
    for tokens, logits in model.chunks(positions, seed + 3):
        part = np.argpartition(-logits, TOP, axis=1)[:, :TOP]
        order = np.argsort(-np.take_along_axis(logits, part, 1), axis=1, kind="stable")
        ids = np.take_along_axis(part, order, 1).astype(np.int32)
        for h, temperature in temperatures.items():
            logp = _log_softmax(logits / np.float32(temperature))
            p = np.exp(logp)
            cumulative = np.cumsum(p, 1, dtype=np.float64)
            u = rng.random((len(p), max(NUM_DRAWS))) * cumulative[:, -1:]
            drawn = np.stack([np.searchsorted(c, x) for c, x in zip(cumulative, u, strict=True)])
            for n in NUM_DRAWS:
                draws[h][n] += [_count(row[:n]) for row in drawn]
            label = drawn[:, 0].astype(np.int32)
            label_logp = logp[np.arange(len(p)), label]
            rank = (logp > label_logp[:, None]).sum(1).astype(np.int32)
            top = np.take_along_axis(logp, ids, 1)
            parts[h].append((ids, top, -(p * logp).sum(1), tokens, label, label_logp, rank))
    out = {}
    for h in entropies:
        columns = [np.concatenate(c) for c in zip(*parts[h], strict=True)]
        joined = {n: _join_draws(draws[h][n]) for n in NUM_DRAWS}
        out[h] = Dump(vocab_size, *columns, joined, model.unigram)
    return out


class _Model:
    def __init__(self, vocab_size: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        rank = np.arange(vocab_size)
        exponent, id_noise = next(shape[1:] for shape in VOCAB_SHAPES if vocab_size <= shape[0])
        by_rank = 1.0 / (rank + 2.7) ** exponent
        # Frequency rank -> id: merge order is frequency order with multiplicative noise.
        id_of_rank = np.argsort(np.argsort(np.log(rank + 20.0) + id_noise * rng.standard_normal(vocab_size)))
        self.unigram = np.empty(vocab_size)
        self.unigram[id_of_rank] = by_rank / by_rank.sum()
        self.cumulative = np.cumsum(self.unigram)
        self.directions = (rng.standard_normal((RANK, vocab_size)) / np.sqrt(RANK)).astype(np.float32)
        self.vocab_size = vocab_size

    def chunks(self, positions: int, seed: int) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
        """(input tokens [C], logits [C, V]) for runs of CHUNK positions."""
        rng = np.random.default_rng(seed)
        state = rng.standard_normal(RANK).astype(np.float32)
        for start in range(0, positions, CHUNK):
            num = min(CHUNK, positions - start)
            states = np.empty((num, RANK), np.float32)
            p = np.empty((num, self.vocab_size), np.float32)
            topic = self._draw(rng, TOPIC)
            for n in range(num):
                state = 0.6 * state + 0.8 * rng.standard_normal(RANK).astype(np.float32)
                states[n] = state
                # How well the context is known varies widely, so entropies do too.
                known = rng.beta(KNOWN_A, KNOWN_B)
                seen = self._draw(rng, int(2 + rng.pareto(0.7) * 3) % 4000 + 1)
                weights = rng.pareto(0.75, len(seen)) + 0.02
                p[n] = (1 - known) * FLOOR * self.unigram
                p[n, topic] += (1 - known) * (1 - FLOOR) / len(topic)
                np.add.at(p[n], seen, (known * weights / weights.sum()).astype(np.float32))
            yield self._draw(rng, num).astype(np.int32), np.log(p) + np.float32(NOISE) * (states @ self.directions)

    def _draw(self, rng: np.random.Generator, num: int) -> NDArray[np.int64]:
        return np.minimum(np.searchsorted(self.cumulative, rng.random(num)), self.vocab_size - 1)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _solve_temperature(logits: NDArray[np.float32], entropy: float) -> float:
    low, high = 0.2, 3.0
    for _ in range(16):
        middle = (low + high) / 2
        logp = _log_softmax(logits / np.float32(middle))
        if float(-(np.exp(logp) * logp).sum(1).mean()) > entropy:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def _count(drawn: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    ids, counts = np.unique(drawn, return_counts=True)
    order = np.lexsort((ids, -counts))
    return ids[order].astype(np.int32), counts[order].astype(np.uint8)


def _join_draws(rows: list) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.uint8]]:
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in rows])]).astype(np.int64)
    return offsets, np.concatenate([ids for ids, _ in rows]), np.concatenate([c for _, c in rows])
