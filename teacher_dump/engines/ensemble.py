"""Several teachers read as one: the targets are of the weighted mixture of their distributions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.kernels import products
from potstill.kernels.soft_cap import scale_and_cap_
from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.base import Head, HiddenStates, Logits, TeacherEngine, TopKWanted
from potstill.teacher_dump.engines.hf import load as load_member
from potstill.teacher_dump.identity import members


class EnsembleEngine:
    """Logits of the mixture: log of the sum of w_i softmax(z_i), with weights that sum to 1.

    A mixture has no head of its own, so all logits [M, V] exist at once: choose batch_rows by that. V is the largest
    head among the members, so that what a padded head puts beyond the tokenizer stays in the sum, and is reported.
    """

    name = "ensemble"

    def __init__(self, members: list[tuple[TeacherEngine, float]]) -> None:
        total = sum(weight for _, weight in members)
        self._members = [(engine, weight / total) for engine, weight in members]
        first = members[0][0]
        self.dtype, self.device = first.dtype, first.device
        self.vocab_size = max(engine.vocab_size for engine, _ in members)

    def forward(self, batch: TeacherBatch) -> Logits:
        """Log of the mixture at the batch's target positions, float32 [M, V]; -inf where no member has an output."""
        # In logs throughout: a probability that float32 cannot hold still counts at a temperature above 1.
        mixture: Tensor | None = None
        for engine, weight in self._members:
            part = self._log_probabilities(engine, batch).add_(math.log(weight))
            mixture = part if mixture is None else torch.logaddexp(mixture, part, out=part)
        assert mixture is not None
        return Logits(mixture)

    def idle_pass(self) -> None:
        """Nothing to do: there is no group."""

    @torch.no_grad()
    def _log_probabilities(self, engine: TeacherEngine, batch: TeacherBatch) -> Tensor:
        output = engine.forward(batch)
        if isinstance(output, HiddenStates):
            logits = _full_logits(output.hidden, output.head)
        else:
            assert isinstance(output, Logits), "a finished top-k cannot be mixed; its engine has no mixture"
            logits = output.logits
        beyond = self.vocab_size - logits.shape[-1]
        return F.pad(logits.float().log_softmax(-1), (0, beyond), value=-math.inf)


def _full_logits(hidden: Tensor, head: Head) -> Tensor:
    """float32 [M, V], as the kernels compute them for a teacher alone: never rounded to the head's bfloat16."""
    out = torch.empty(hidden.shape[0], head.weight.shape[0], dtype=torch.float32, device=hidden.device)
    raw = products.logits(hidden, head.weight, head.bias, out=out)
    return scale_and_cap_(raw, logit_scale=head.logit_scale, soft_cap=head.soft_cap)


def load(teacher: TeacherConfig, wanted: TopKWanted | None = None) -> EnsembleEngine:
    """Load every member onto the worker's device. Raises UserError."""
    alone = teacher.model_copy(update={"ensemble": []})
    others = [(load_member(member), weight) for member, weight in members(teacher)]
    return EnsembleEngine([(load_member(alone), teacher.weight), *others])
