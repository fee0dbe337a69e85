"""From the answers of a batch to rows: pass rates and grades per document, and the answers that are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from potstill.storage import ScoresRow, TokensRow
from potstill.teacher_dump.packing.base import Ids, Mask, joined_row
from potstill.teacher_dump.pipeline import BatchRows
from potstill.teacher_dump.rollouts.config import Keep, RolloutConfig
from potstill.teacher_dump.rollouts.questions import Question
from potstill.teacher_dump.rollouts.texts import Judge


@dataclass(frozen=True)
class RolloutResult:
    """See HostResult. `scored`: what `score` makes of the rows; `answers`: those to each question of each row, in the
    order of `config.numbers`."""

    config: RolloutConfig
    scored: BatchRows
    tokens: Sequence[TokensRow]
    judge: Judge
    questions: Sequence[Sequence[Question | None]]
    answers: Sequence[Ids]

    def rows(self) -> BatchRows:
        """Grade, and cut into the rows of both stores. Raises UserError where a grader does."""
        scored, answers = self.scored, iter(self.answers)
        rows, beside = [], []
        sums = dict.fromkeys(("prompts", "samples", "passed", "ended"), 0.0)
        for (row, refused), tokens, questions in zip(scored.rows, self.tokens, self.questions, strict=True):
            assert isinstance(row, ScoresRow)
            of_row = [None if one is None else self._graded(one, answers) for one in questions]
            rows.append((_with_documents(row, of_row, self.config), refused))
            beside.append(kept_row(tokens, [one for one in of_row if one is not None], self.config))
            for graded in of_row:
                for name, value in ({} if graded is None else graded.sums(self.judge.stop_ids)).items():
                    sums[name] += value
        return BatchRows(rows, {**scored.figures, **sums}, beside=() if self.config.keep == "none" else beside)

    def _graded(self, question: Question, following: Iterator[Ids]) -> Graded:
        """The next answers are those to this question. Equal ones are graded once."""
        answers = [next(following) for _ in self.config.numbers]
        known: dict[bytes, float] = {}
        for answer in answers:
            if answer.tobytes() not in known:
                known[answer.tobytes()] = self.judge.grade(question, answer)
        grades = [known[answer.tobytes()] for answer in answers]
        return Graded(question, answers, grades, self.config)


@dataclass(frozen=True)
class Graded:
    """The answers to a question with their grades, in the order of `config.numbers`."""

    question: Question
    answers: Sequence[Ids]
    grades: Sequence[float]
    config: RolloutConfig

    @property
    def passed(self) -> list[bool]:
        """Whether each answer passed."""
        return [grade >= self.config.grader.passing for grade in self.grades]

    @property
    def figures(self) -> Mapping[str, float]:
        """What the scores store holds of the document, by column."""
        samples = self.passed[int(self.config.greedy) :]
        found = {"pass_rate": sum(samples) / len(samples)} if samples else {}
        return found | ({"greedy_score": self.grades[0]} if self.config.greedy else {})

    def sums(self, stop_ids: frozenset[int]) -> Mapping[str, float]:
        """What the worker adds up."""
        samples = self.passed[int(self.config.greedy) :]
        ended = sum(int(answer[-1]) in stop_ids for answer in self.answers)
        return {"prompts": 1, "samples": len(samples), "passed": sum(samples), "ended": ended}

    def kept(self, keep: Keep) -> list[Ids]:
        """The answers that are kept."""
        if keep == "first":
            return list(self.answers[:1])
        wanted = {"all": (True, False), "passed": (True,), "failed": (False,), "none": ()}[keep]
        return [answer for answer, passed in zip(self.answers, self.passed, strict=True) if passed in wanted]


def _with_documents(row: ScoresRow, graded: Sequence[Graded | None], config: RolloutConfig) -> ScoresRow:
    """The row with its columns per document and their means; a document without a question has NaN."""
    more, means = {}, {}
    for name in config.columns:
        values = [np.nan if one is None else one.figures[name] for one in graded]
        more[name] = np.array(values, np.float32)
        known = [value for value in values if not np.isnan(value)]
        means[f"mean_{name}"] = float(np.mean(known)) if known else 0.0
    return replace(row, more=more, stats={**row.stats, **means})


def kept_row(tokens: TokensRow, graded: Sequence[Graded], config: RolloutConfig) -> TokensRow:
    """The kept answers to the questions of a row, each a document: the prompt masked off, the answer trained on.

    A row must hold something: where nothing is kept it has the first token of its prompts, not trained on, which
    packing leaves out.
    """
    parts: list[tuple[Ids, Mask | None]] = [
        (
            np.concatenate([one.question.prompt, answer]),
            np.arange(len(one.question.prompt) + len(answer)) >= len(one.question.prompt),
        )
        for one in graded
        for answer in one.kept(config.keep)
    ]
    return joined_row(tokens.row, parts or [(tokens.tokens[:1], np.zeros(1, np.bool_))])
