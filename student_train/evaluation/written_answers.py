"""Answers that a student writes after the prompts of held-out documents, compared with the references in the rows.

The mask of a document says what is prompt and what is answer. Token for token a greedy answer is the reference where
each trained token is the most probable one (answers.py); what is written is needed where another answer may pass too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from potstill.common.answer_text import Decode, answer_limit, decoder, end_ids_of, first_end
from potstill.common.grading import Grader
from potstill.storage import TokensRow
from potstill.student_train.config.answers import AnswersConfig
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.data.store_tokenizer import read_tokenizer
from potstill.student_train.data.stores import Stores
from potstill.student_train.evaluation.continuing import greedily, writing
from potstill.student_train.evaluation.samples import load_tokenizer, marks, tokenizer_folder
from potstill.student_train.evaluation.together import Work, work_together
from potstill.student_train.model.requests import RunsRequests

NUM_WRITTEN = 4


@dataclass(frozen=True)
class Answer:
    """A document's tokens before its first trained one, and the trained ones from there to the next that is not."""

    prompt: tuple[int, ...]
    reference: tuple[int, ...]


def answers_of(rows: Iterable[TokensRow]) -> list[Answer]:
    """The answers in these rows, one for each document with a trained token behind its first one."""
    found = []
    for row in rows:
        ends = np.cumsum(row.doc_lens)
        trained = row.has_target()  # position t says that token t + 1 is trained on
        for start, end in zip((ends - row.doc_lens).tolist(), ends.tolist(), strict=True):
            places = np.flatnonzero(trained[start:end])
            if not len(places):
                continue
            first = start + int(places[0]) + 1
            behind = np.flatnonzero(~trained[first - 1 : end])  # a document's last token predicts nothing
            last = first + int(behind[0])
            found.append(Answer(tuple(row.tokens[start:first].tolist()), tuple(row.tokens[first:last].tolist())))
    return found


@dataclass(frozen=True)
class AnswerWriting:
    """How answers are written and compared.

    max_rows: of the held-out ones, None: all. end_ids: an answer ends before the first of them. grade: of texts, from
    `passing` on a pass; None: only equal tokens are counted. max_tokens: of each graded answer at most, None: as many
    as the longest reference has. vocab_size: ids at and above it are never written (a head's padding).
    """

    max_rows: int | None
    max_tokens: int | None
    end_ids: frozenset[int]
    grade: Grader | None
    passing: float
    decode: Decode | None
    vocab_size: int

    def counts(
        self,
        model: RunsRequests,
        answers: Sequence[Answer],
        *,
        row_length: int,
        batch_rows: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> list[float]:
        """[NUM_WRITTEN] of this rank's share: answers written, exact ones, sum of the grades, passes (collective).

        An answer is exact where its tokens up to its end are the reference's up to its own, or begin with a reference
        that has no end. An answer may not leave a row.
        """
        work = self.work(
            answers, row_length=row_length, batch_rows=batch_rows, rank=rank, world_size=world_size, device=device
        )
        return work_together(work, model, device=device, world_size=world_size)

    def work(
        self,
        answers: Sequence[Answer],
        *,
        row_length: int,
        batch_rows: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> Work[list[float]]:
        """The counts of this rank's share as a generator of forwards."""
        most = self.max_tokens or max((len(answer.reference) for answer in answers), default=0)
        limits = [self.limit(answer, most=most, row_length=row_length) for answer in answers]
        order = sorted(range(len(answers)), key=lambda n: (len(answers[n].prompt) + limits[n], n))
        found = [0.0] * NUM_WRITTEN
        for first in range(rank * batch_rows, len(order), batch_rows * world_size):
            mine = order[first : first + batch_rows]
            texts = yield from writing(
                [answers[n].prompt for n in mine],
                limits=[limits[n] for n in mine],
                vocab_size=self.vocab_size,
                choose=greedily,
                device=device,
                end_ids=self.end_ids,
            )
            for number, text in zip(mine, texts, strict=True):
                for at, value in enumerate(self.compare(text, answers[number].reference)):
                    found[at] += value
        return found

    def limit(self, answer: Answer, *, most: int, row_length: int) -> int:
        """Tokens that are written, at most `most`; a reference needs no more than its own to be exact."""
        needs_more = self.grade is not None and first_end(answer.reference, self.end_ids) is not None
        most = answer_limit(most, reference=len(answer.reference), has_end=needs_more)
        return min(most, row_length - len(answer.prompt))

    def compare(self, text: Sequence[int], reference: Sequence[int]) -> tuple[float, ...]:
        """What one answer adds to the counts."""
        mine, wanted = self._before_end(text), self._before_end(reference)
        has_end = len(wanted) < len(reference)
        is_exact = mine == wanted and len(mine) < len(text) if has_end else list(text[: len(wanted)]) == wanted
        if self.grade is None:
            return 1.0, float(is_exact), 0.0, 0.0
        assert self.decode is not None
        grade = self.grade(self.decode(mine), self.decode(wanted))
        return 1.0, float(is_exact), grade, float(grade >= self.passing)

    def _before_end(self, ids: Sequence[int]) -> list[int]:
        return list(ids[: first_end(ids, self.end_ids)])


def answer_writing(
    options: AnswersConfig, *, end_ids: Iterable[int], decode: Decode | None, vocab_size: int
) -> AnswerWriting:
    """How answers are written by these options. Raises UserError where the user's grader cannot be found."""
    return AnswerWriting(
        max_rows=options.max_rows,
        max_tokens=options.max_tokens,
        end_ids=frozenset(end_ids),
        grade=options.grader.make() if options.has_grader else None,
        passing=options.grader.passing,
        decode=decode,
        vocab_size=vocab_size,
    )


def answer_reading(
    config: TrainConfig, stores: Stores, student: Any, *, graded: bool, key: str
) -> tuple[frozenset[int], Decode | None]:
    """Ids that end an answer of a run, and how texts are read where answers are graded (common/answer_text.py).

    student: its configuration of transformers; it is what rollouts of the run's exports find. Raises UserError that
    names `key` where the tokenizer of graded answers is not found, or not the one of the stores.
    """
    suffix = marks(stores, "suffix")
    if not graded:
        return end_ids_of(suffix, None), None
    load_tokenizer(config, vocab_size=stores.vocab_size, key=key)  # which looks whether it can be the one
    tokenizer = read_tokenizer(tokenizer_folder(config, key=key))
    return end_ids_of(suffix, tokenizer, [student.get_text_config()]), decoder(tokenizer)


def answer_writing_of(config: TrainConfig, stores: Stores, student: Any) -> AnswerWriting | None:
    """How a run writes answers, None where it does not. student: its configuration; raises as answer_reading."""
    if not config.eval.answers.generate:
        return None
    graded = config.eval.answers.has_grader
    end_ids, decode = answer_reading(config, stores, student, graded=graded, key="eval.answers.grader")
    return answer_writing(config.eval.answers, end_ids=end_ids, decode=decode, vocab_size=stores.vocab_size)


def written_figures(counts: Sequence[float], *, graded: bool) -> dict[str, float]:
    """answer_exact (share of the written answers), and their mean answer_grade and answer_pass_rate where graded."""
    written, exact, grades, passes = counts
    if not written:
        return {}
    found = {"answer_exact": exact / written}
    if graded:
        found |= {"answer_grade": grades / written, "answer_pass_rate": passes / written}
    return {**found, "answers_written": written}
