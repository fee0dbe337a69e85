"""A dense teacher over a small vocabulary, its sparse targets, and what they are to a student with another one."""

from __future__ import annotations

import numpy as np

from potstill.storage import SparseTargets, VocabularyMap

V = 40
TEMPERATURES = (1.5, 2.0)


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def teacher_logits(num_tokens: int = 12) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(num_tokens, V)) * 3


def sparse(logits: np.ndarray, k: int) -> SparseTargets:
    """The `k` best of each token with exact tails; the last token has no target."""
    num_tokens, p = len(logits), softmax(logits)
    kept = np.full(num_tokens, k)
    kept[-1] = 0
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    has = (kept > 0)[:, None]

    def tail(temperature: float) -> np.ndarray:
        at = softmax(logits / temperature)
        rest = 1.0 - np.take_along_axis(at, ids, 1).sum(1)
        with np.errstate(divide="ignore"):
            return np.where(has[:, 0], np.log(np.maximum(rest, 0.0)), 0.0)

    return SparseTargets.build(
        offsets=np.concatenate([[0], np.cumsum(kept)]),
        ids=ids[has[:, 0]].reshape(-1),
        logprobs=np.log(np.take_along_axis(p, ids, 1))[has[:, 0]].reshape(-1),
        log_tail=tail(1.0),
        log_tail_at={t: tail(t) for t in TEMPERATURES},
        label_logprob=np.log(p[:, 5]),
        label_rank=np.zeros(num_tokens, np.int32),
        vocab_size=V,
    )


def trimmed(num_dropped: int = 9, *, new: int = 3, seed: int = 5) -> VocabularyMap:
    """A map to a vocabulary in another order without some ids and with `new` more."""
    rng = np.random.default_rng(seed)
    size = V - num_dropped + new
    table = np.full(V, -1)
    table[rng.permutation(V)[: V - num_dropped]] = rng.permutation(size)[: V - num_dropped]
    return VocabularyMap.build(table, vocab_size=size)


def merged_kl(
    logits: np.ndarray, student: np.ndarray, table: np.ndarray, k: int, *, temperature: float = 1.0
) -> np.ndarray:
    """KL [N] of the dense teacher, with what is dropped or beyond the k best merged into one bucket."""
    p, q = softmax(logits / temperature), softmax(student / temperature)
    out = np.zeros(len(logits))
    for n in range(len(logits) - 1):
        kept = [int(i) for i in np.argsort(-logits[n], kind="stable")[:k] if table[i] >= 0]
        if not kept:
            continue
        listed, own = p[n, kept], q[n, table[kept]]
        rest, own_rest = 1.0 - listed.sum(), 1.0 - own.sum()
        out[n] = (listed * np.log(listed / own)).sum() + rest * np.log(rest / own_rest)
    return out
