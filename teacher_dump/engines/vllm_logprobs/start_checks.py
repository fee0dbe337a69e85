"""Checks of vLLM's log-probabilities before the first unit: wrong ones would be stored as if they were right.

Two short prompts alone, told over the whole output layer, are the measure: log-probabilities that sum to 1 and are not
the same for every prompt. Against it: the best of them with label and rank, as a dump asks for them; both prompts among
others, in either order; the same teacher by other means, where it is small. And a prompt computed in pieces.

Legend: P tokens of a prompt, V output rows, R best ids.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from potstill.common.errors import UserError
from potstill.teacher_dump.engines.base import TopKWanted
from potstill.teacher_dump.engines.head import relative_difference, tolerance
from potstill.teacher_dump.engines.vllm_engine.reference import Reference, best_distance
from potstill.teacher_dump.engines.vllm_logprobs.runner import Answer, LogprobsRunner, Question, ask

log = logging.getLogger(__name__)

_LENGTHS = (5, 8)  # tokens of the two prompts: all their log-probabilities come as Python numbers
_PIECES = 24  # tokens of the prompt that is computed in pieces
_MOST_TOKENS = 1 << 15  # that are run to have a prompt computed in pieces
# Share of what two positions of the teacher differ by (mean total variation); see vllm_engine/checks.py.
_SHARE = 1 / 8
_MASS = 1e-3  # by which a whole distribution may miss 1
_ALIKE = 1e-6  # nats by which all positions of a working teacher are never alike
# Mass of output rows beyond the tokenizer that do not stand among the R best: log-probabilities are too low by it.
MOST_UNTOLD = 1e-4
_ADVICE = "nothing is stored; try another vLLM version, or use engine hf"


@dataclass(frozen=True)
class Nearness:
    """How near two answers to one prompt must be. loose, and spread: as in vllm_engine/checks.py."""

    tolerance: float
    loose: bool
    spread: float

    def same(self, first: Answer, second: Answer, *, head_size: int) -> str:
        """Nothing, or how far two answers of the R best are apart."""
        # What the first tells, and for all other ids what they have there at most.
        whole = first.logprobs.amin(1, keepdim=True).repeat(1, head_size).scatter(1, first.best, first.logprobs)
        return self.agree(second, whole.scatter(1, first.labels[:, None], first.label_logprob[:, None]))

    def agree(self, answer: Answer, whole: Tensor) -> str:
        """Nothing, or how far an answer is from log-probabilities [P, V] of the same prompt."""
        relative = max(
            relative_difference(found, expected)
            for found, expected in (
                (answer.logprobs, whole.gather(1, answer.best)),
                (answer.label_logprob, whole.gather(1, answer.labels[:, None])[:, 0]),
            )
        )
        apart = float(best_distance(whole, answer.best, answer.logprobs).mean())
        label = float((answer.label_logprob.exp() - whole.gather(1, answer.labels[:, None])[:, 0].exp()).abs().mean())
        # Written so that NaN is no agreement.
        if relative <= self.tolerance or (self.loose and max(apart, label) <= _SHARE * self.spread):
            return ""
        return (
            f"other log-probabilities (by {relative:.2g} of the largest, allowed are {self.tolerance:.2g}; mean total "
            f"variation {apart:.2g})"
        )


def check_at_start(
    runner: LogprobsRunner,
    wanted: TopKWanted,
    *,
    num_best: int,
    dtype: torch.dtype,
    loose: bool = False,
    reference: Reference | None = None,
) -> Nearness:
    """How near two answers of this teacher must be. Raises UserError for the first check that fails.

    dtype: of the weights, which says how near is near enough. loose: whether the teacher computes a token otherwise in
    another batch, by its own making. reference: of the prompts of `probe_pair`.
    """
    pair = probe_pair(wanted.vocab_size, runner.longest)
    whole = [_whole(runner, question) for question in pair]
    if any(bool(one.isnan().any()) for one in whole):
        log.warning("engine vllm_logprobs: the teacher's logits are not finite on two short prompts; rows will tell")
        return Nearness(tolerance(dtype), loose, spread=0.0)
    _check_whole(whole)
    _check_untold(whole, vocab_size=wanted.vocab_size, num_best=num_best)
    lines = torch.cat(whole).exp()
    spread = float((lines - lines.roll(1, 0)).abs().sum(1).mean()) / 2
    near = Nearness(tolerance(dtype), loose, spread)
    others = probe_questions(wanted.vocab_size, [min(size, runner.longest) for size in (3, 13, 1)], seed=1)
    first, second = pair
    for what, asked in (
        ("alone", [first]),
        ("alone", [second]),
        ("among others", [others[0], first, others[1], second, others[2]]),
        ("in another order", [second, others[2], first]),
    ):
        answers = ask(runner, asked, num_best)
        for question, answer in zip(asked, answers, strict=True):
            if question in pair:
                _check_answer(answer, whole[pair.index(question)], what, near=near)
    _check_pieces(runner, wanted, num_best=num_best, near=near)
    if reference is not None:
        _check_reference(whole, reference)
    return near


def probe_pair(vocab_size: int, longest: int) -> list[Question]:
    """The two prompts that are the measure."""
    return probe_questions(vocab_size, [min(size, longest) for size in _LENGTHS])


def probe_questions(vocab_size: int, lengths: Sequence[int], *, seed: int = 0) -> list[Question]:
    """Prompts of these lengths with ids spread over the vocabulary, the same at every call."""
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(0, vocab_size, length + 1).tolist() for length in lengths]
    return [Question(ids[:-1], ids[-1]) for ids in drawn]


def _whole(runner: LogprobsRunner, question: Question) -> Tensor:
    """All log-probabilities [P, V] of a prompt alone."""
    answer = ask(runner, [question], runner.head_size)[0]
    found = torch.full((len(question.ids), runner.head_size), torch.inf)
    found.scatter_(1, answer.best, answer.logprobs)
    if bool((found == torch.inf).any()):
        raise UserError(
            f"engine vllm_logprobs: of {runner.head_size} ids asked for vLLM told some twice and others not; {_ADVICE}"
        )
    return found


def _check_whole(whole: Sequence[Tensor]) -> None:
    mass = torch.cat([one.double().exp().sum(1) for one in whole])
    if not bool(((mass - 1).abs() <= _MASS).all()):
        raise UserError(
            f"engine vllm_logprobs: vLLM's log-probabilities over all ids sum to {mass.tolist()[:4]}, expected 1 "
            f"within {_MASS}: they are not those of a softmax over the whole output layer; {_ADVICE}"
        )
    lines = torch.cat(list(whole))
    if bool(((lines - lines[0]).nan_to_num(0.0).abs() <= _ALIKE).all()):
        raise UserError(
            "engine vllm_logprobs: vLLM tells the same log-probabilities after every prompt, which no working teacher "
            f"does; {_ADVICE}"
        )


def _check_untold(whole: Sequence[Tensor], *, vocab_size: int, num_best: int) -> None:
    """Mass of rows beyond the tokenizer cannot be taken out where these rows are not among the R best."""
    lines = torch.cat(list(whole))
    rows = torch.arange(lines.shape[1]) >= vocab_size
    beyond = torch.where(rows, lines.double(), -torch.inf)
    best = lines.topk(num_best, dim=1).indices
    untold = (beyond.exp().sum(1) - beyond.gather(1, best).exp().sum(1)).max()
    if not float(untold) <= MOST_UNTOLD:
        raise UserError(
            f"engine vllm_logprobs: the output layer has {int(rows.sum())} rows beyond the tokenizer's {vocab_size} "
            f"ids, and they hold a mass of {float(untold):.2g} that does not show among the {num_best} best; it cannot "
            f"be taken out of what is stored (allowed are {MOST_UNTOLD}): check that the tokenizer is the teacher's, "
            "or use engine hf or vllm"
        )


def _check_answer(answer: Answer, whole: Tensor, what: str, *, near: Nearness) -> None:
    """An answer of the R best against the whole distribution of the same prompt alone."""
    wrong = near.agree(answer, whole)
    slack = near.tolerance * float(whole[whole.isfinite()].abs().max())
    least = whole.topk(answer.best.shape[1], dim=1).values[:, -1]
    low = (whole > answer.label_logprob[:, None] + slack).sum(1)
    high = (whole >= answer.label_logprob[:, None] - slack).sum(1)
    misplaced = (answer.label_rank - 1 < low) | (answer.label_rank > high)
    # In a loose teacher near equals change places with the batch; each batch is checked in itself (top_logprobs.py).
    if not wrong and not near.loose and bool((answer.logprobs.amin(1) < least - slack).any()):
        wrong = "ids that are not the best"
    if not wrong and not near.loose and bool(misplaced.any()):
        wrong = f"a rank that is not its label's ({int(answer.label_rank[misplaced][0])})"
    if wrong:
        raise UserError(f"engine vllm_logprobs: asked {what}, vLLM tells {wrong} of a prompt; {_ADVICE}")


def _check_pieces(runner: LogprobsRunner, wanted: TopKWanted, *, num_best: int, near: Nearness) -> None:
    """A prompt behind so many others that a step of vLLM ends in the middle of it."""
    if runner.at_once is None or runner.at_once > _MOST_TOKENS:
        log.warning("engine vllm_logprobs: prompts in pieces are not checked (tokens of a step: %s)", runner.at_once)
        return
    size = min(_PIECES, runner.longest)
    before = max(0, runner.at_once - size // 2)
    lengths = [runner.longest] * (before // runner.longest) + [before % runner.longest]
    (question,) = probe_questions(wanted.vocab_size, [size], seed=2)
    others = probe_questions(wanted.vocab_size, [length for length in lengths if length], seed=3)
    (alone,) = ask(runner, [question], num_best)
    *_, cut = ask(runner, [*others, question], num_best)
    if text := near.same(alone, cut, head_size=runner.head_size):
        raise UserError(f"engine vllm_logprobs: computed in pieces, a prompt gets {text}; {_ADVICE}")


def _check_reference(whole: Sequence[Tensor], reference: Reference) -> None:
    found = reference.distance(whole)
    log.info(
        "engine vllm_logprobs: against %s: mean total variation %.2g, allowed are %.2g (%s)",
        reference.source,
        found,
        reference.bound,
        reference.bound_text,
    )
    if not found <= reference.bound:
        raise UserError(
            f"engine vllm_logprobs: vLLM's log-probabilities are not those of {reference.source}: mean total variation "
            f"{found:.2g}, allowed are {reference.bound:.2g} ({reference.bound_text}); {_ADVICE}"
        )
