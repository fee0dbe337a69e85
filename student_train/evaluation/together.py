"""Forwards of all ranks in step, however much work each of them has.

Under ZeRO-3 every forward gathers the weights from all ranks, so none may make one alone. Work is written as a
generator that asks for what it needs and gets the answer; a rank that has none left joins in with a small forward that
counts for nothing.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import distributed

from potstill.student_train.model.checks import measuring, probe_batch
from potstill.student_train.model.probe import HiddenStatesRequest
from potstill.student_train.model.requests import Request, RunsRequests

T = TypeVar("T")
Work = Generator[Request[Any], Any, T]  # yields a request, is sent its result, returns what it was for


@torch.no_grad()
def work_together(work: Work[T], model: RunsRequests, *, device: torch.device, world_size: int) -> T:
    """Do this rank's work with the forwards of the others (a collective call): in evaluation mode, without gradients.

    `model` is a StudentModel or the engine around one. Returns what `work` returns. What it raises is raised here, on
    this rank alone: work should keep what is wrong for when all are done.
    """
    nothing = HiddenStatesRequest(probe_batch(torch.zeros(1, 2, dtype=torch.int64, device=device), np.array([2])))
    request, result = _ask(work, None)
    with measuring(model), torch.compiler.set_stance("force_eager"):
        while _any(request is not None, device=device, world_size=world_size):
            answer = model(nothing if request is None else request)
            if request is not None:
                request, result = _ask(work, answer)
    return result[0]


def _ask(work: Work[T], answer: Any) -> tuple[Request[Any] | None, list[T]]:
    """The next request, or None and what the work has come to."""
    try:
        return work.send(answer), []
    except StopIteration as end:
        return None, [end.value]


def _any(mine: bool, *, device: torch.device, world_size: int) -> bool:
    """Whether it is so on any rank."""
    if world_size == 1:
        return mine
    count = torch.tensor(float(mine), device=device)
    distributed.all_reduce(count)
    return bool(count > 0)
