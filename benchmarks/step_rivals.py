"""What a benchmark of whole steps changes in a run of the trainer: the label loss of somebody else, no checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.fused_ce import Rival, liger, torch_best
from benchmarks.replaced import replaced
from potstill.kernels.types import IGNORE_LABEL, LossSums
from potstill.student_train.model import head
from potstill.student_train.run.saves import Saves

RIVALS = ("liger_ce", "torch_ce")


def find_rival(name: str) -> Rival | None:
    """A rival by its name in RIVALS; None where this machine lacks it."""
    if name == "torch_ce":
        return torch_best()
    return liger(wide=False) if torch.cuda.is_available() else None


@contextmanager
def label_loss_of(rival: Rival | None) -> Iterator[None]:
    """While open, the student's head takes its loss from `rival`, as a trainer built on it would; None: from us.

    Only the figures that cost nothing are there: cross-entropy and the weights.
    """
    if rival is None:
        yield
        return

    def loss_and_sums(
        *,
        hidden: Tensor,
        weight: Tensor,
        targets: Any,
        labels: Tensor,
        bias: Tensor | None = None,
        normalizer: Tensor,
        **_: Any,
    ) -> tuple[Tensor, LossSums]:
        if targets is not None or bias is not None:
            raise ValueError(f"{rival.name} is a label loss without bias; this step has targets or a bias")
        total = rival.loss(hidden, weight, labels)
        count = (labels != IGNORE_LABEL).sum().float()
        zero = count.new_zeros(())
        sums = dict.fromkeys(LossSums.names(), zero)
        sums |= {"ce": total.detach().float(), "weight": count, "label_weight": count, "num_labels": count}
        return total / normalizer, LossSums(**sums)

    with replaced(head, "linear_sparse_loss", loss_and_sums):
        yield


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """While open, a run saves nothing: gigabytes of a large student, which no figure here is about."""
    with replaced(Saves, "write", lambda self: None):
        yield
