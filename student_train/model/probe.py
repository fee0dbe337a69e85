"""Requests that train nothing: figures of held-out rows, hidden states and logits to look at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from potstill.kernels.types import IGNORE_LABEL
from potstill.student_train.curriculum.step_objective import StepObjective
from potstill.student_train.data.batch import MicroBatch
from potstill.student_train.evaluation.answers import answer_counts
from potstill.student_train.evaluation.calibration import calibration_bins, top_choices
from potstill.student_train.model.head import DistillationHead, SparseLossRequest

if TYPE_CHECKING:
    from potstill.student_train.model.student import StudentModel


@dataclass(frozen=True)
class HeldoutRequest:
    """Sums of the sparse loss float32 [S] (SparseLoss.sum_names), calibration bins [3 * NUM_BINS] and counts of answers

    [2] (answer_counts) of a micro-batch. No other term of the loss is part of it: held-out figures are those of the
    model, however it was trained.
    """

    micro: MicroBatch
    objective: StepObjective

    def run(self, student: StudentModel) -> tuple[Tensor, Tensor, Tensor]:
        """All three, to be added up over micro-batches."""
        hidden = student.hidden_states(self.micro)
        sums: Tensor
        bins: Tensor
        answers: Tensor
        sums, bins, answers = student.hf.lm_head(hidden, _HeldoutOfHead(self.micro, self.objective))
        return sums, bins, answers


@dataclass(frozen=True)
class _HeldoutOfHead:
    """HeldoutRequest, from the hidden states on."""

    micro: MicroBatch
    objective: StepObjective

    def run(self, head: DistillationHead, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one = torch.ones((), device=hidden.device)
        _, sums = SparseLossRequest(self.micro, self.objective, one).run(head, hidden)
        weights, _ = head.choice(hidden, self.micro, self.objective)
        choices = top_choices(
            hidden,
            head.weight,
            head.bias,
            self.micro.labels,
            weights,
            soft_cap=head.soft_cap,
            logit_scale=head.logit_scale,
        )
        return sums, calibration_bins(choices, weights), answer_counts(self.micro, choices)


@dataclass(frozen=True)
class LabelFiguresRequest:
    """What the student says of each label of a micro-batch."""

    micro: MicroBatch

    def run(self, student: StudentModel) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, whether the label is the most probable token (1 or 0), and entropy, each float32 [N]; 0 without one."""
        hidden = student.hidden_states(self.micro)
        loss: Tensor
        correct: Tensor
        entropy: Tensor
        loss, correct, entropy = student.hf.lm_head(hidden, _LabelFiguresOfHead(self.micro))
        return loss, correct, entropy


@dataclass(frozen=True)
class _LabelFiguresOfHead:
    """LabelFiguresRequest, from the hidden states on."""

    micro: MicroBatch

    def run(self, head: DistillationHead, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        labels = self.micro.labels
        places = (labels != IGNORE_LABEL).nonzero()[:, 0]  # an answer is often a small part of its row
        found = torch.zeros(3, len(labels), device=hidden.device)
        if len(places):
            figures = head.statistics(hidden[places], replace(self.micro, labels=labels[places]), None)
            found[:, places] = torch.stack([-figures.label_logprob, figures.correct, figures.entropy]).float()
        return found[0], found[1], found[2]


@dataclass(frozen=True)
class HiddenStatesRequest:
    """Hidden states before the head of a micro-batch."""

    micro: MicroBatch

    def run(self, student: StudentModel) -> Tensor:
        """[N, D], of the real tokens."""
        return student.hidden_states(self.micro)


@dataclass(frozen=True)
class BothLogitsRequest:
    """The logits that the loss works on beside those of the Hugging Face model, for a micro-batch of full rows."""

    micro: MicroBatch

    def run(self, student: StudentModel) -> tuple[Tensor, Tensor]:
        """[N, V] each: as the loss computes them, and as the Hugging Face model does."""
        head = student.hf.lm_head
        ours: Tensor = head.finish(head(student.hidden_states(self.micro)))
        ids, places = self.micro.input_ids, self.micro.position_ids
        theirs: Tensor = student.hf(input_ids=ids, position_ids=places, use_cache=False).logits.flatten(0, 1)
        return ours, theirs


@dataclass(frozen=True)
class NextLogitsRequest:
    """Logits of the token behind one place of each full row. after: int64 [B], that place."""

    micro: MicroBatch
    after: Tensor

    def run(self, student: StudentModel) -> Tensor:
        """[B, V] float32, as the loss has them."""
        hidden = student.hidden_states(self.micro).view(*self.micro.input_ids.shape, -1)  # [B, L, D]
        last = hidden[torch.arange(len(self.after), device=self.after.device), self.after]
        logits: Tensor = student.hf.lm_head.finish(student.hf.lm_head(last))
        return logits.float()
