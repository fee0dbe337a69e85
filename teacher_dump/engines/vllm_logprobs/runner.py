"""Something that tells the best log-probabilities of prompts: the joint between the engine and vLLM, and its checks.

Legend: P tokens of a prompt, R best ids told of each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from potstill.teacher_dump.engines.vllm_engine.runner import ADVICE, WrongAnswerError


@dataclass(frozen=True)
class Question:
    """A prompt, and the token after it: each position is asked for the log-probability of the next token."""

    ids: list[int]
    after: int

    @property
    def labels(self) -> list[int]:
        """The next token of each position, [P]."""
        return [*self.ids[1:], self.after]


@dataclass(frozen=True)
class Answer:
    """What came back for a prompt: the ids as the engine says it has read them, and of each position, at T = 1,
    normalised over the whole output layer: the label (int64 [P]), its log-probability float32 [P] and its rank int64
    [P], how many ids are at or above it, itself included; the R best ids int64 [P, R] and their float32 [P, R].
    """

    ids: list[int]
    labels: Tensor
    label_logprob: Tensor
    label_rank: Tensor
    best: Tensor
    logprobs: Tensor


class LogprobsRunner(Protocol):
    """Something that runs prompts. Answers are in the order of the questions."""

    @property
    def head_size(self) -> int:
        """Output rows of the model, padding included."""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt that it takes."""

    @property
    def at_once(self) -> int | None:
        """Tokens that it computes in one step; what is beyond that is computed later, a prompt in pieces if need be.

        None: it does not say.
        """

    def logprobs(self, questions: Sequence[Question], num_best: int) -> list[Answer]:
        """Run the prompts, all in one call; `num_best` ids of each position, at most the output rows."""

    def notes(self) -> Mapping[str, Any]:
        """What it says of itself, for the records of units."""


def ask(
    runner: LogprobsRunner, questions: Sequence[Question], num_best: int, *, names: Sequence[str] | None = None
) -> list[Answer]:
    """The answers, after the checks that cost nothing: count, ids, labels, shapes. Raises WrongAnswerError.

    names: of the prompts, for errors.
    """
    answers = runner.logprobs(questions, num_best)
    if len(answers) != len(questions):
        raise WrongAnswerError(f"vLLM gave {len(answers)} answers to {len(questions)} prompts; {ADVICE}")
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        name = f"prompt {number} of {len(questions)}" if names is None else names[number]
        if answer.ids != question.ids:
            raise WrongAnswerError(
                f"vLLM answered another prompt than that of {name} ({answer.ids[:5]}.. of {len(answer.ids)} ids for "
                f"{question.ids[:5]}.. of {len(question.ids)}): answers are mixed up; {ADVICE}"
            )
        found, size = answer.best.shape, len(question.ids)
        one = [list(part.shape) for part in (answer.labels, answer.label_logprob, answer.label_rank)]
        if list(found) != [size, num_best] or answer.logprobs.shape != found or one != [[size]] * 3:
            raise WrongAnswerError(
                f"vLLM gave log-probabilities {list(answer.logprobs.shape)} and labels {one[0]} for {name}, expected "
                f"{[size, num_best]} and {[size]}: positions are missing; {ADVICE}"
            )
        apart = answer.labels != torch.tensor(question.labels)
        if bool(apart.any()):
            at = int(apart.nonzero()[0])
            raise WrongAnswerError(
                f"vLLM told of id {int(answer.labels[at])} at token {at} of {name}, whose next token is "
                f"{question.labels[at]}: positions are shifted, or the model rules that token out; {ADVICE}"
            )
    return answers
