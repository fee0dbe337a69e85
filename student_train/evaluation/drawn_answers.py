"""Pass rates of documents: the share of a student's own drawn answers that pass, as a generator of forwards.

Each draw is named by seed, document, answer and position (kernels/next_token.py), and answers are written in batches
that depend on the rows alone: the rates are the same at any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.common.errors import UserError
from potstill.kernels.next_token import draw_uniforms, drawn_tokens
from potstill.storage import TokensRow
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.data.stores import Stores
from potstill.student_train.evaluation.samples import load_tokenizer, marks, special_ids
from potstill.student_train.evaluation.together import Work
from potstill.student_train.evaluation.written_answers import Answer, AnswerWriting, answers_of
from potstill.student_train.model.checks import probe_batch
from potstill.student_train.model.probe import NextLogitsRequest

Float32 = NDArray[np.float32]
_DOCUMENT_BITS = 24  # a row has fewer documents


@dataclass(frozen=True)
class AnswerDrawing:
    """How answers are drawn: per_prompt of each document, `batch` at a time; writing: how long they get, what passes.

    vocab_size: ids at and above it are never taken (a head's padding); row_length: prompt and answer fit into it.
    """

    writing: AnswerWriting
    per_prompt: int
    temperature: float
    batch: int
    vocab_size: int
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
            drawn = [_Drawn(answers[n], units[n], k, self._limit(answers[n])) for n, k in part]
            yield from self._write(drawn, step)
            for (number, _), one in zip(part, drawn, strict=True):
                passed[number] += self._passes(one)
        rates = np.full(first, np.nan, np.float32)
        rates[places] = passed / self.per_prompt
        return rates

    def _limit(self, answer: Answer) -> int:
        most = self.writing.max_tokens or len(answer.reference)
        return min(most, self.row_length - len(answer.prompt))

    def _write(self, drawn: Sequence[_Drawn], step: int) -> Work[None]:
        """Draw the tokens of these answers. Whole rows are computed again for each token, without a cache."""
        alive = [one for one in drawn if one.limit > 0]
        while alive:
            lengths = torch.tensor([len(one.answer.prompt) + len(one.ids) for one in alive])
            ids = torch.zeros(len(alive), int(lengths.max()), dtype=torch.int64)
            for number, one in enumerate(alive):
                ids[number, : int(lengths[number])] = torch.tensor([*one.answer.prompt, *one.ids])
            micro = probe_batch(ids.to(self.device), np.array([ids.shape[1]], np.int64))
            logits = yield NextLogitsRequest(micro, after=(lengths - 1).to(self.device))
            for one, token in zip(alive, self._choose(logits, alive, step).tolist(), strict=True):
                one.ids.append(token)
            alive = [one for one in alive if len(one.ids) < one.limit and one.ids[-1] not in self.writing.end_ids]

    def _choose(self, logits: Tensor, alive: Sequence[_Drawn], step: int) -> Tensor:
        # Weights that are not finite are told by the losses of the same rows, on all ranks; here an id is enough.
        known = torch.nan_to_num(logits[:, : self.vocab_size].float().cpu())
        uniforms = draw_uniforms(
            seed=self.seed + (step << 32),
            units=torch.tensor([one.unit for one in alive]),
            numbers=torch.tensor([one.number for one in alive]),
            positions=torch.tensor([len(one.ids) for one in alive]),
        )
        return drawn_tokens(known, uniforms, temperature=self.temperature)

    def _passes(self, one: _Drawn) -> float:
        _, exact, _, passed = self.writing.compare(one.ids, one.answer.reference)
        return exact if self.writing.grade is None else passed


@dataclass
class _Drawn:
    """Answer `number` to the prompt of the document `unit`, of at most `limit` tokens, as far as it is written."""

    answer: Answer
    unit: int
    number: int
    limit: int

    def __post_init__(self) -> None:
        self.ids: list[int] = []


def _documents_with_answer(row: TokensRow) -> NDArray[np.int64]:
    """Numbers of the documents of a row that have a trained token behind their first one."""
    document = np.repeat(np.arange(len(row.doc_lens)), row.doc_lens)
    return np.flatnonzero(np.bincount(document[row.has_target()], minlength=len(row.doc_lens)))


def drawn_writing(config: TrainConfig, stores: Stores) -> AnswerWriting | None:
    """How the answers of rescoring end and pass, None where none are drawn.

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
    grader, end_ids = options.generated.grader, set(marks(stores, "suffix"))
    decode: Callable[[Sequence[int]], str] | None = None
    if grader.kind != "exact":  # which compares tokens
        tokenizer = load_tokenizer(config, vocab_size=stores.vocab_size, key="rescoring.generated.grader")
        end_ids |= special_ids(tokenizer)

        def decode(ids: Sequence[int]) -> str:
            return str(tokenizer.decode(list(ids), skip_special_tokens=False))

    return AnswerWriting(
        max_rows=None,
        max_tokens=options.generated.max_new_tokens,
        end_ids=frozenset(end_ids),
        grade=None if grader.kind == "exact" else grader.make(),
        passing=grader.passing,
        decode=decode,
    )
