"""Answers of held-out documents that a student has wholly right, read off the forward that measures the loss.

An answer is what the mask of a document leaves to be trained on. It is right where the student's most probable token is
the label at each of its positions, given the document up to there: that is when greedy decoding writes it, token for
token, after the document's beginning, so that the exact match of a written answer costs no generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from potstill.student_train.data.batch import MicroBatch
    from potstill.student_train.evaluation.calibration import TopChoices

NUM_COUNTS = 2


@torch.no_grad()
def answer_counts(micro: MicroBatch, choices: TopChoices) -> Tensor:
    """[2] float32: documents that have an answer, and those of them whose answer is right.

    A document counts where one of its positions has a weight above 0. Of equal logits the first token is the choice.
    """
    places = micro.position_ids.flatten()
    places = places if micro.token_index is None else places[micro.token_index]  # [N]
    document = ((places == 0).cumsum(0) - 1)[choices.place]  # [M], number in the micro-batch
    measured, wrong = torch.zeros(2, len(places), device=places.device)
    measured.index_add_(0, document, torch.ones_like(choices.confidence))
    wrong.index_add_(0, document, (~choices.is_label).float())
    return torch.stack([measured > 0, (measured > 0) & (wrong == 0)]).sum(1).float()


def answer_figures(counts: Sequence[float]) -> dict[str, float]:
    """answer_accuracy (share of the answers that are right) and answers (how many there are); {} without any."""
    answers, right = counts
    return {"answer_accuracy": right / answers, "answers": answers} if answers else {}
