"""Several teachers read as one: the targets are of the weighted mixture of their distributions."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.base import TeacherEngine, TeacherOutput
from potstill.teacher_dump.engines.head import apply_head
from potstill.teacher_dump.engines.hf import load as load_member
from potstill.teacher_dump.identity import members


class EnsembleEngine:
    """Logits of the mixture: log of the sum of w_i softmax(z_i), with weights that sum to 1.

    A mixture has no head of its own, so all logits [M, V] exist at once: choose batch_rows by that. V is the smallest
    head among the members; the tokenizer's ids are below it.
    """

    name = "ensemble"
    head = None

    def __init__(self, members: list[tuple[TeacherEngine, float]]) -> None:
        total = sum(weight for _, weight in members)
        self._members = [(engine, weight / total) for engine, weight in members]
        first = members[0][0]
        self.dtype, self.device = first.dtype, first.device
        self.vocab_size = min(engine.vocab_size for engine, _ in members)

    def forward(self, batch: TeacherBatch) -> TeacherOutput:
        """Log of the mixture at the batch's target positions, float32 [M, V]."""
        mixture: Tensor | None = None
        for engine, weight in self._members:
            part = self._probabilities(engine, batch).mul_(weight)
            mixture = part if mixture is None else mixture.add_(part)
        assert mixture is not None
        return TeacherOutput(logits=mixture.log_())

    def idle_pass(self) -> None:
        """Nothing to do: there is no group."""

    def _probabilities(self, engine: TeacherEngine, batch: TeacherBatch) -> Tensor:
        output = engine.forward(batch)
        logits = output.logits
        if logits is None:
            assert output.hidden is not None and engine.head is not None
            with torch.no_grad():
                logits = apply_head(output.hidden, engine.head)
        return logits.float().softmax(-1)[:, : self.vocab_size]


def load(teacher: TeacherConfig) -> EnsembleEngine:
    """Load every member onto the worker's device. Raises UserError."""
    alone = teacher.model_copy(update={"ensemble": []})
    others = [(load_member(member), weight) for member, weight in members(teacher)]
    return EnsembleEngine([(load_member(alone), teacher.weight), *others])
