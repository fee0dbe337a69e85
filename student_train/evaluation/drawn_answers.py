"""Pass rates of documents: the share of a student's own drawn answers that pass, as a generator of forwards.

Each draw is named by seed, document, answer and position (kernels/next_token.py), and answers are written in batches
that depend on the rows alone: the rates are the same at any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.common.errors import UserError
from potstill.kernels.next_token import draw_uniforms, drawn_tokens
from potstill.storage import TokensRow
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.data.stores import Stores
from potstill.student_train.evaluation.continuing import Choose, writing
from potstill.student_train.evaluation.together import Work
from potstill.student_train.evaluation.written_answers import Answer, AnswerWriting, answer_reading, answers_of

Float32 = NDArray[np.float32]
_DOCUMENT_BITS = 24  # a row has fewer documents


@dataclass(frozen=True)
class AnswerDrawing:
    """How answers are drawn: per_prompt of each document, `batch` at a time; writing: how long they get, what passes.

    row_length: prompt and answer fit into it.
    """

    writing: AnswerWriting
    per_prompt: int
    temperature: float
    batch: int
    row_length: int
    seed: int
    device: torch.device

    def pass_rates(self, rows: Sequence[TokensRow], *, step: int) -> Work[Float32]:
        """Of the documents of these rows [D], row after row; NaN of a document without an answer."""
        places, answers, units = [], [], []
        first = 0
        for row in rows:
            has_answer = _documents_with_answer(row)
            places += [first + int(number) for number in has_answer]
            units += [(row.row << _DOCUMENT_BITS) + int(number) for number in has_answer]
            answers += answers_of([row])
            first += len(row.doc_lens)
        asked = [(n, k) for n in range(len(answers)) for k in range(self.per_prompt)]
        passed = np.zeros(len(answers))
        for start in range(0, len(asked), self.batch):
            part = asked[start : start + self.batch]
            texts = yield from writing(
                [answers[n].prompt for n, _ in part],
                limits=[self._limit(answers[n]) for n, _ in part],
                vocab_size=self.writing.vocab_size,
                choose=self._choosing([units[n] for n, _ in part], [k for _, k in part], step),
                device=self.device,
                end_ids=self.writing.end_ids,
            )
            for (number, _), text in zip(part, texts, strict=True):
                passed[number] += self._passes(text, answers[number])
        rates = np.full(first, np.nan, np.float32)
        rates[places] = passed / self.per_prompt
        return rates

    def _limit(self, answer: Answer) -> int:
        most = self.writing.max_tokens or len(answer.reference)
        return self.writing.limit(answer, most=most, row_length=self.row_length)

    def _choosing(self, units: Sequence[int], numbers: Sequence[int], step: int) -> Choose:
        """How the tokens of answer `numbers` to the prompt of each of the documents `units` are drawn."""
        of_unit, of_number = torch.tensor(units), torch.tensor(numbers)

        def choose(logits: Tensor, which: Tensor, places: Tensor) -> Tensor:
            # Weights that are not finite are told by the losses of the same rows, on all ranks; here an id is enough.
            known = torch.nan_to_num(logits.float())
            seed = self.seed + (step << 32)
            uniforms = draw_uniforms(seed=seed, units=of_unit[which], numbers=of_number[which], positions=places)
            return drawn_tokens(known, uniforms, temperature=self.temperature)

        return choose

    def _passes(self, text: Sequence[int], answer: Answer) -> float:
        _, exact, _, passed = self.writing.compare(text, answer.reference)
        return exact if self.writing.grade is None else passed


def _documents_with_answer(row: TokensRow) -> NDArray[np.int64]:
    """Numbers of the documents of a row that have a trained token behind their first one."""
    document = np.repeat(np.arange(len(row.doc_lens)), row.doc_lens)
    return np.flatnonzero(np.bincount(document[row.has_target()], minlength=len(row.doc_lens)))


def drawn_writing(config: TrainConfig, stores: Stores, student: Any) -> AnswerWriting | None:
    """How the answers of rescoring end and pass, None where none are drawn. student: its configuration.

    Raises UserError where the stores have no masks, or a tokenizer or the user's grader cannot be found.
    """
    options = config.rescoring
    if options is None or options.measure != "generated":
        return None
    for source in stores.sources:
        if not source.tokens.spec.stores("mask"):
            raise UserError(
                f"rescoring.measure generated has answers written after prompts, but {source.tokens.url} has no masks "
                "that say which tokens are prompts; prepare prompts with answers, or use measure forced"
            )
    grader = options.generated.grader
    graded = grader.kind != "exact"  # which compares tokens
    end_ids, decode = answer_reading(config, stores, student, graded=graded, key="rescoring.generated.grader")
    return AnswerWriting(
        max_rows=None,
        max_tokens=options.generated.max_new_tokens,
        end_ids=end_ids,
        grade=grader.make() if graded else None,
        passing=grader.passing,
        decode=decode,
        vocab_size=stores.vocab_size,
    )
