"""A loss term in one file: hidden states that shall come near a vector which is known of each row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from potstill.storage import LoadedBatch
from potstill.student_train.config.train import ModelConfig
from potstill.student_train.model import loss_terms
from potstill.student_train.model.term import LossTerm, TermInput
from tests.student_train import workers

WEIGHT, WIDTH = 0.25, 32


def vector_of(row: int) -> np.ndarray:
    """The vector [D] float32 of a row, by its id."""
    return np.random.Generator(np.random.Philox(key=row)).normal(size=WIDTH).astype(np.float32)


class HiddenMatching(LossTerm):
    """WEIGHT * mean over the rows of a step of the mean squared error [D] at the row's last position."""

    sum_names = ("hidden_error", "hidden_rows")
    parts: Mapping[str, tuple[str, str]] = {"hidden_error": ("hidden_error", "hidden_rows")}

    @classmethod
    def build(cls, model: ModelConfig, config: Any) -> LossTerm | None:
        return cls()

    def columns(self, batch: LoadedBatch, part: slice) -> dict[str, Tensor]:
        vectors = np.stack([vector_of(row.row) for row in batch.tokens[part]])
        return {"hidden_matching": torch.from_numpy(vectors)}  # [B, D]

    def loss(self, given: TermInput) -> tuple[Tensor, Tensor]:
        micro = given.micro
        last = torch.bincount(micro.row, minlength=micro.num_rows).cumsum(0) - 1  # [B]: rows lie one after another
        found = self.project(given.hidden[last])  # [B, D]
        error = (found - micro.extras["hidden_matching"].to(found.dtype)).square().mean(-1)  # [B]
        sums = torch.stack([error.detach().sum().float(), torch.ones_like(error).sum().float()])
        return WEIGHT / given.num_micro_batches * error.mean(), sums

    def project(self, hidden: Tensor) -> Tensor:
        return hidden


class ProjectedMatching(HiddenMatching, nn.Module):
    """The same behind a learnt projection, which the optimizer has among its matrices."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.projection = nn.Linear(WIDTH, WIDTH, bias=False)

    def project(self, hidden: Tensor) -> Tensor:
        projected: Tensor = self.projection(hidden)
        return projected


class SwitchedOff(HiddenMatching):
    """In the table, but not part of this student."""

    @classmethod
    def build(cls, model: ModelConfig, config: Any) -> None:
        return None


def use(*terms: type[LossTerm]) -> None:
    """Enter terms in the table of this process."""
    loss_terms.LOSS_TERMS = (*loss_terms.LOSS_TERMS, *terms)


def train_with(tree: dict[str, Any], *terms: type[LossTerm]) -> dict[str, Any]:
    """Train as a rank, with these terms in the table."""
    use(*terms)
    return workers.train_run(tree)
