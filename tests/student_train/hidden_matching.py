"""A loss term in one file: hidden states that shall come near a vector which a store holds of each row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from potstill.storage import LoadedBatch, StoreReader, TargetsRow
from potstill.storage.rows.column import Column
from potstill.storage.rows.columns import COLUMNS
from potstill.student_train.config.train import ModelConfig
from potstill.student_train.model import loss_terms
from potstill.student_train.model.term import LossTerm, TermInput
from tests.student_train import tiny, workers

WEIGHT, WIDTH = 0.25, 32
STORE = "vectors"  # its name in data.targets
COLUMN = Column(
    name="hidden_state",
    axis="row",
    dtype=np.float16,
    vector=lambda spec: WIDTH,
    value_bytes=2,
    encode=lambda values, coding: (np.frombuffer(values.astype("<f2").tobytes(), np.uint8),),
    decode=lambda planes, coding: np.frombuffer(planes[0].tobytes(), "<f2").reshape(-1, WIDTH),
    feature="hidden_states",
)


class HiddenMatching(LossTerm):
    """WEIGHT * mean over the rows of a step of the mean squared error [D] at the row's last position."""

    sum_names = ("hidden_error", "hidden_rows")
    parts: Mapping[str, tuple[str, str]] = {"hidden_error": ("hidden_error", "hidden_rows")}

    @classmethod
    def build(cls, model: ModelConfig, config: Any) -> LossTerm | None:
        return cls()

    @classmethod
    def stores(cls, model: ModelConfig) -> frozenset[str]:
        return frozenset({STORE})

    def columns(self, batch: LoadedBatch, part: slice) -> dict[str, Tensor]:
        rows = [row.targets for row in batch.joined[STORE][part] if isinstance(row, TargetsRow)]
        return {"hidden_matching": torch.from_numpy(np.concatenate([row.columns["hidden_state"] for row in rows]))}

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

    @classmethod
    def stores(cls, model: ModelConfig) -> frozenset[str]:
        return frozenset()


def vector_of(row: int) -> np.ndarray:
    """The vector [1, D] float16 of a row, by its id."""
    return np.random.Generator(np.random.Philox(key=row)).normal(size=(1, WIDTH)).astype(np.float16)


def write_vectors(folder: Path, stores: dict[str, Path]) -> Path:
    """A targets store that holds a vector of each row beside what the teacher's store holds."""
    COLUMNS[COLUMN.name] = COLUMN
    tokens, spec = StoreReader(stores["tokens"]), StoreReader(stores["teacher"]).spec
    made = [
        tiny.targets_row(row, tiny.transition(), temperatures=spec.temperatures)
        for row in tokens.tokens_rows(range(tokens.num_rows))
    ]
    rows = [replace(row, targets=replace(row.targets, hidden_state=vector_of(row.row))) for row in made]
    tiny.write_store(folder, replace(spec, columns=(COLUMN.name,)), rows)
    return folder


def use(*terms: type[LossTerm]) -> None:
    """Enter terms, and the column that they read, in the tables of this process."""
    COLUMNS[COLUMN.name] = COLUMN
    loss_terms.LOSS_TERMS = (*loss_terms.LOSS_TERMS, *terms)


def train_with(tree: dict[str, Any], *terms: type[LossTerm]) -> dict[str, Any]:
    """Train as a rank, with these terms in the table."""
    use(*terms)
    return workers.train_run(tree)
