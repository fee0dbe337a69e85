"""Continuations of prompts by a student, through the module that DeepSpeed wraps; nothing of it touches training.

The one loop that writes tokens: samples, held-out answers and the draws of rescoring differ in how an id is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from potstill.kernels.next_token import greedy_tokens
from potstill.student_train.evaluation.together import Work, work_together
from potstill.student_train.model.checks import probe_batch
from potstill.student_train.model.probe import NextLogitsRequest
from potstill.student_train.model.requests import RunsRequests

# (logits float32 [B, V] on the CPU, numbers int64 [B] of their prompts, places int64 [B] of the tokens in their texts)
# -> ids int64 [B]
Choose = Callable[[Tensor, Tensor, Tensor], Tensor]


def greedily(logits: Tensor, numbers: Tensor, places: Tensor) -> Tensor:
    """The most probable id each time."""
    return greedy_tokens(logits)


def writing(
    prompts: Sequence[Sequence[int]],
    *,
    limits: Sequence[int],
    vocab_size: int,
    choose: Choose,
    device: torch.device,
    end_ids: Collection[int] = (),
) -> Work[list[list[int]]]:
    """What the model writes behind each prompt (at least one id each), as a generator of forwards.

    limits: most ids of each. end_ids: one of them is the last id of its text. vocab_size: ids at and above it are never
    chosen (a head's padding). Every forward computes whole rows of what is not at its end again, without a cache of
    keys and values: that works in any module that DeepSpeed has wrapped, and texts are short.
    """
    texts: list[list[int]] = [[] for _ in prompts]
    alive = [number for number, limit in enumerate(limits) if limit > 0]
    while alive:
        rows = [[*prompts[number], *texts[number]] for number in alive]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)  # causal attention never sees the rest
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
        micro = probe_batch(ids.to(device), np.array([ids.shape[1]], np.int64))
        logits = yield NextLogitsRequest(micro, after=(lengths - 1).to(device))
        places = torch.tensor([len(texts[number]) for number in alive])
        chosen = choose(logits[:, :vocab_size].cpu(), torch.tensor(alive), places)
        for number, token in zip(alive, chosen.tolist(), strict=True):
            texts[number].append(token)
        alive = [number for number in alive if len(texts[number]) < limits[number] and texts[number][-1] not in end_ids]
    return texts


def continued(
    model: RunsRequests,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    vocab_size: int,
    choose: Choose,
    device: torch.device,
) -> list[list[int]]:
    """`num_tokens` ids behind each prompt, written by `model`, a StudentModel or the engine around one.

    A collective call: every rank writes the same texts, so that all make the same forwards (see together.py).
    """
    limits = [num_tokens] * len(prompts)
    work = writing(prompts, limits=limits, vocab_size=vocab_size, choose=choose, device=device)
    return work_together(work, model, device=device, world_size=1)
