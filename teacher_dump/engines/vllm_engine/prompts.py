"""Rows -> prompts of a serving engine and back: one prompt for each document that has a target.

Legend: M target positions of a batch, D hidden size, P tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from potstill.storage import TokensRow
from potstill.teacher_dump.batches import TeacherBatch, spans_with_targets

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """A document up to its last target: the token after that is a label only, and never read."""

    row: int
    start: int  # first token in the row
    ids: list[int]
    targets: NDArray[np.int64]  # positions of the prompt whose next token is to be predicted, ascending

    @property
    def every(self) -> bool:
        """Whether each position of the prompt is wanted."""
        return len(self.targets) == len(self.ids)

    @property
    def where(self) -> str:
        """For errors: which tokens of which row these are."""
        return f"row {self.row}, tokens {self.start} to {self.start + len(self.ids) - 1}"


def prompts_of(batch: TeacherBatch) -> list[Prompt]:
    """Prompts in the order of the batch's positions: their targets, joined, are its M positions."""
    found = [prompt for row in batch.rows for prompt in _of_row(row)]
    count = sum(len(prompt.targets) for prompt in found)
    assert count == len(batch.labels), (count, len(batch.labels))
    return found


def _of_row(row: TokensRow) -> list[Prompt]:
    prompts = []
    for start, _, here in spans_with_targets(row):
        if len(here):
            ids = row.tokens[start : int(here[-1]) + 1]
            prompts.append(Prompt(row.row, start, ids.tolist(), here - start))
    return prompts


def at_targets(prompts: Sequence[Prompt], states: Sequence[Tensor]) -> Tensor:
    """States [P, D] of each prompt -> those at the batch's positions [M, D], in a tensor of its own."""
    import torch

    parts = [
        state if prompt.every else state[torch.from_numpy(prompt.targets)]
        for prompt, state in zip(prompts, states, strict=True)
    ]
    # Joined outside of inference mode: the parts may be inference tensors, the result is none.
    return torch.cat(parts)
