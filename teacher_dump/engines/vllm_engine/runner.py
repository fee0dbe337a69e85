"""The seam between the engine and vLLM: prompts in, hidden states out, and what is checked of every answer.

Legend: P tokens of a prompt, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from potstill.teacher_dump.pipeline import WalkEndedError

if TYPE_CHECKING:
    from torch import Tensor, dtype

ADVICE = "nothing of this batch is stored; try another vLLM version, or use engine hf"


class WrongAnswerError(WalkEndedError):
    """The engine's answers cannot be those of the prompts. Ends the walk: the next unit would fare no better."""


@dataclass(frozen=True)
class Answer:
    """What came back for a prompt: the ids as the engine says it has read them, and its states after the final norm."""

    ids: list[int]
    states: Tensor  # [P, D]


class PromptRunner(Protocol):
    """Something that runs prompts. Answers are in the order of the prompts."""

    @property
    def dtype(self) -> dtype:
        """Type of the states."""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt that it takes."""

    @property
    def at_once(self) -> int | None:
        """Tokens that it computes in one step; what is beyond that is computed later, a prompt in pieces if need be.

        None: it does not say.
        """

    def hidden_states(self, prompts: Sequence[list[int]]) -> list[Answer]:
        """Run the prompts, all in one call."""

    def notes(self) -> Mapping[str, Any]:
        """What it says of itself, for the records of units."""

    def tokens_counted(self) -> int | None:
        """Prompt tokens by its own count since it was made; None where it keeps none."""


def ask(
    runner: PromptRunner, prompts: Sequence[list[int]], hidden_size: int, *, names: Sequence[str] | None = None
) -> list[Tensor]:
    """States [P, D] of each prompt, after the checks that cost nothing: count, ids, shapes. Raises WrongAnswerError.

    names: of the prompts, for errors.
    """
    answers = runner.hidden_states(prompts)
    if len(answers) != len(prompts):
        raise WrongAnswerError(f"vLLM gave {len(answers)} answers to {len(prompts)} prompts; {ADVICE}")
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        name = f"prompt {number} of {len(prompts)}" if names is None else names[number]
        if answer.ids != prompt:
            at = next((i for i, pair in enumerate(zip(prompt, answer.ids, strict=False)) if pair[0] != pair[1]), -1)
            place = f"first other id at token {at}" if at >= 0 else f"{len(answer.ids)} ids for {len(prompt)}"
            raise WrongAnswerError(
                f"vLLM answered another prompt than that of {name} ({place}): answers are mixed up; {ADVICE}"
            )
        if tuple(answer.states.shape) != (len(prompt), hidden_size):
            raise WrongAnswerError(
                f"vLLM gave hidden states {list(answer.states.shape)} for {name}, expected "
                f"{[len(prompt), hidden_size]}: states of tokens are missing or of another layer; {ADVICE}"
            )
        if answer.states.dtype != runner.dtype:
            raise WrongAnswerError(
                f"vLLM gave hidden states of {answer.states.dtype} for {name}, expected {runner.dtype}, in which the "
                f"model computes; {ADVICE}"
            )
    return [answer.states for answer in answers]
