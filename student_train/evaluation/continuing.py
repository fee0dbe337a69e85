"""Continuations of prompts by a student, through the module that DeepSpeed wraps; nothing of it touches training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.student_train.model.checks import measuring, probe_batch
from potstill.student_train.model.probe import NextLogitsRequest


def never(texts: Sequence[Sequence[int]]) -> bool:
    """Write all tokens that are asked for."""
    return False


@torch.no_grad()
def continued(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    choose: Callable[[Tensor], Tensor],
    device: torch.device,
    is_over: Callable[[Sequence[Sequence[int]]], bool] = never,
) -> list[list[int]]:
    """What the model writes behind each prompt (at least one id each): `num_tokens` ids, or fewer where `is_over`.

    `model` is a StudentModel or the engine around one (a collective call: under ZeRO-3 each forward gathers the weights
    from all ranks, so that `is_over`, asked with what is written so far, must say the same on all of them). `choose`
    makes the next ids [B] of logits [B, V] on the CPU. Every forward computes whole rows again, without a cache of keys
    and values: that works in any module that DeepSpeed has wrapped, and texts are short.
    """
    starts = [len(prompt) for prompt in prompts]
    lengths = torch.tensor(starts)
    rows, width = torch.arange(len(prompts)), max(starts) + num_tokens
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)  # [B, W]; causal attention never sees the rest
    for row, prompt in enumerate(prompts):
        ids[row, : starts[row]] = torch.tensor(prompt)

    def written() -> list[list[int]]:
        return [ids[row, start : int(lengths[row])].tolist() for row, start in enumerate(starts)]

    # A compiled backbone would be compiled once more for the shape of these rows.
    with measuring(model), torch.compiler.set_stance("force_eager"):
        for _ in range(num_tokens):
            micro = probe_batch(ids.to(device), np.array([width], np.int64))
            logits = model(NextLogitsRequest(micro, after=(lengths - 1).to(device)))
            ids[rows, lengths] = choose(logits.cpu())
            lengths += 1
            if is_over(written()):
                break
    return written()
