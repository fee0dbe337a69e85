"""The loss of the examples written out in dense float64 torch, without the kernels: what they must come to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill.storage import StoreReader


def apart(model: Any, tokens: StoreReader, rows: list[int]) -> list[tuple[int, int, Tensor]]:
    """(row, position in it, log-probabilities [V] float64) wherever there is a next token in the same document.

    Each document goes through the model on its own, so that nothing of another one can be seen.
    """
    found = []
    for row in tokens.tokens_rows(rows):
        start = 0
        for length in row.doc_lens.tolist():
            ids = torch.from_numpy(row.tokens[start : start + length].astype("int64"))[None]
            logits = model(input_ids=ids, use_cache=False).logits[0].double()
            found += [(row.row, start + n, torch.log_softmax(logits[n], -1)) for n in range(length - 1)]
            start += length
    return found


def loss(model: Any, tokens: StoreReader, targets: StoreReader, rows: list[int], *, alpha: float) -> tuple[Tensor, int]:
    """(sum over labelled positions of alpha * KL on kept ids and tail + (1 - alpha) * CE, how many positions)."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, position, log_q in apart(model, tokens, rows):
        teacher = targets.targets_rows([row])[0].targets.candidates(position)
        label = int(tokens.tokens_rows([row])[0].tokens[position + 1])
        ids = torch.from_numpy(teacher.ids.astype("int64"))
        p = torch.cat([torch.from_numpy(teacher.probs.astype("float64")), torch.tensor([teacher.tail]).double()])
        p = p / p.sum()
        rest = torch.ones(log_q.shape[0], dtype=torch.bool)
        rest[ids] = False
        log_q_buckets = torch.cat([log_q[ids], torch.logsumexp(log_q[rest], 0)[None]])
        kl = (p * (p.log() - log_q_buckets)).sum()
        total = total + alpha * kl - (1 - alpha) * log_q[label]
        count += 1
    return total, count
