"""What is tried of a runner before the first unit: each way in which such an engine is known to go wrong in silence.

On record elsewhere, without an error from the engine: states of zeros (hybrid models, vllm#46301), answers of other
requests (vllm#45734, speculators#279), missing tokens in large batches (speculators#613), states before the final norm
(Model-Optimizer#1846).

Legend: P tokens of a prompt, D hidden size, V output rows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.common.packed import probe_ids
from potstill.teacher_dump.engines.base import Head
from potstill.teacher_dump.engines.head import apply_head, relative_difference, tolerance
from potstill.teacher_dump.engines.vllm_engine.reference import Reference
from potstill.teacher_dump.engines.vllm_engine.runner import ADVICE, PromptRunner, WrongAnswerError, ask

log = logging.getLogger(__name__)

_LENGTHS = (8, 61, 128)
_COMPARED = 128  # positions of a prompt at most: the logits of a long one would not fit
# Share of what two positions of the teacher differ by (mean total variation). Answers of another request are all of it;
# where experts are chosen anew, or activations rounded anew, in another batch, a healthy engine stays far below.
_SHARE = 1 / 8


def probe_prompts(vocab_size: int, longest: int) -> list[list[int]]:
    """Three prompts of different lengths and two of one length, all with ids of their own."""
    # A token less than the longest: that one is generated where prompt_logprobs are asked for.
    lengths = [min(one, max(1, longest - 1)) for one in (*_LENGTHS, _LENGTHS[1])]
    return [_prompt(number, length, vocab_size) for number, length in enumerate(lengths)]


def _prompt(number: int, length: int, vocab_size: int) -> list[int]:
    found: list[int] = probe_ids(torch.arange(length) + 1009 * number, vocab_size).tolist()
    return found


@dataclass(frozen=True, kw_only=True)
class RunnerCheck:
    """A runner and the head that reads its states.

    loose: whether the teacher computes a token otherwise in another batch, by its own making: experts that are chosen
    anew at near ties, activations that are quantised with their neighbours. Such states are held to the distributions
    that come of them.
    """

    runner: PromptRunner
    head: Head
    loose: bool

    @torch.no_grad()
    def run(self, reference: Reference | None) -> float:
        """All of it; returns the spread that `agree` takes. The reference is of `probe_prompts`.

        Raises WrongAnswerError that names what was found.
        """
        if reference is None:
            prompts = probe_prompts(self.head.weight.shape[0], self.runner.longest)
        else:
            prompts = list(reference.prompts)
        alone = [self._ask([prompt])[0] for prompt in prompts]
        self._check_sane(prompts, alone)
        spread = self._spread(alone)
        self._check_swapped(prompts, alone, spread)
        self._check_mixed(prompts, alone, spread)
        self._check_pieces(spread)
        if reference is not None:
            self._check_reference(alone, reference)
        return spread

    def agree(self, found: Tensor, expected: Tensor, spread: float) -> str | None:
        """None where states [P, D] of one prompt are the same up to what two batches may differ in; else how far apart.

        spread: mean total variation between two positions of the teacher.
        """
        places = torch.linspace(0, len(expected) - 1, min(_COMPARED, len(expected))).long()
        a, b = (self._logits(states[places]) for states in (found, expected))
        relative = relative_difference(a, b)
        apart = _total_variation(a.log_softmax(-1), b.log_softmax(-1))
        # Written so that NaN is no agreement.
        near, alike = relative <= tolerance(self.runner.dtype), apart <= _SHARE * spread
        if alike and (near or self.loose):
            if not near:
                log.warning(
                    "engine vllm: states of one prompt in two batches differ by %.2g of the largest logit, and by %.2g "
                    "in mean total variation; this teacher chooses experts or rounds by the batch, so that is let pass",
                    relative,
                    apart,
                )
            return None
        return (
            f"their logits differ by {relative:.2g} of the largest, allowed are {tolerance(self.runner.dtype)}; mean "
            f"total variation {apart:.2g}, allowed are {_SHARE * spread:.2g}"
        )

    def _logits(self, states: Tensor) -> Tensor:
        """float32 [P, V], rounded to the head's dtype as the model's own are."""
        return apply_head(states.to(self.head.weight.device), self.head).float()

    def _ask(self, prompts: Sequence[list[int]]) -> list[Tensor]:
        # Cloned: what the runner gives may be inference tensors, or memory that it uses again.
        return [states.clone() for states in ask(self.runner, prompts, self.head.weight.shape[1])]

    def _check_sane(self, prompts: Sequence[list[int]], alone: Sequence[Tensor]) -> None:
        for prompt, states in zip(prompts, alone, strict=True):
            check_states(states, f"a prompt of {len(prompt)} tokens")
        first = torch.cat([states[:1] for states in alone])
        tokens = {prompt[0] for prompt in prompts}
        if len(first.unique(dim=0)) < len(tokens):
            raise WrongAnswerError(f"vLLM gives the same hidden state to different first tokens; {ADVICE}")
        for prompt, states in zip(prompts, alone, strict=True):
            if (equal := (states[1:] == states[:-1]).all(dim=1)).any():
                raise WrongAnswerError(
                    f"vLLM gives the same hidden state to tokens {int(equal.nonzero()[0])} and the one after of a "
                    f"prompt of {len(prompt)}; expected a state for each token; {ADVICE}"
                )

    def _spread(self, alone: Sequence[Tensor]) -> float:
        """Mean total variation between the distributions at two positions: what a mix-up of answers would show."""
        log_p = self._logits(torch.cat(list(alone))[-2 * _COMPARED :]).log_softmax(-1)
        return _total_variation(log_p, log_p.roll(1, 0))

    def _check_swapped(self, prompts: Sequence[list[int]], alone: Sequence[Tensor], spread: float) -> None:
        for order in ((1, 3), (3, 1)):
            found = self._ask([prompts[number] for number in order])
            for number, states in zip(order, found, strict=True):
                if text := self.agree(states, alone[number], spread):
                    raise WrongAnswerError(
                        "vLLM gives other hidden states to one of two prompts of the same length when they are sent "
                        f"together, in the order {order} ({text}): answers are mixed up, as on record in vllm#45734 "
                        f"and speculators#279; {ADVICE}"
                    )

    def _check_mixed(self, prompts: Sequence[list[int]], alone: Sequence[Tensor], spread: float) -> None:
        order = [number % len(prompts) for number in (2, 0, 3, 1, 1, 3, 0, 2, 2, 1, 3, 0)]
        for number, states in zip(order, self._ask([prompts[number] for number in order]), strict=True):
            if text := self.agree(states, alone[number], spread):
                raise WrongAnswerError(
                    f"vLLM gives other hidden states to a prompt among {len(order)} than to the same one alone "
                    f"({text}); expected the same: answers are mixed up, or the model reads what is beside a "
                    f"prompt; {ADVICE}"
                )

    def _check_pieces(self, spread: float) -> None:
        """More tokens than are computed in one step, so that a prompt is computed in pieces."""
        at_once = self.runner.at_once
        if at_once is None:
            return
        length = max(1, min(self.runner.longest, at_once * 3 // 4))
        lengths = [max(1, length // 2)]  # so that the step ends inside of a prompt
        while sum(lengths) < at_once + length // 4:
            lengths.append(length)
        prompts = [_prompt(10 + number, one, self.head.weight.shape[0]) for number, one in enumerate(lengths)]
        ends = torch.tensor(lengths).cumsum(0)
        in_pieces = int((ends > at_once).nonzero()[0]) if bool((ends > at_once).any()) else len(prompts) - 1
        together = self._ask(prompts)
        for number in sorted({0, in_pieces, len(prompts) - 1}):
            if text := self.agree(together[number], self._ask([prompts[number]])[0], spread):
                raise WrongAnswerError(
                    f"vLLM gives other hidden states to a prompt of {lengths[number]} tokens among {sum(lengths)} "
                    f"tokens, of which it computes {at_once} in one step, than to the same one alone ({text}); "
                    f"expected the same: prompts in pieces come out wrong; {ADVICE}"
                )

    def _check_reference(self, alone: Sequence[Tensor], reference: Reference) -> None:
        found = reference.distance([self._logits(states).log_softmax(-1) for states in alone])
        bound = reference.bound
        log.info(
            "engine vllm: head(hidden) against %s: mean total variation %.2g, allowed are %.2g (%s)",
            reference.source,
            found,
            bound,
            reference.bound_text,
        )
        if not found <= bound:
            raise WrongAnswerError(
                f"vLLM's hidden states with the head of the checkpoint do not give what {reference.source} gives: mean "
                f"total variation {found:.2g}, allowed are {bound:.2g} ({reference.bound_text}). They may be of "
                "another layer or from before the final norm (as on record in Model-Optimizer#1846), or the head is "
                f"scaled in a way that config.json does not say; {ADVICE}"
            )


def check_states(states: Tensor, name: str) -> None:
    """Raise WrongAnswerError where states [P, D] hold a token of zeros only, or are not finite."""
    if not bool(states.isfinite().all()):
        raise WrongAnswerError(f"vLLM gives NaN or Inf for {name}; check dtype and quantisation; {ADVICE}")
    check_no_zeros(states, name)


def check_no_zeros(states: Tensor, name: str) -> None:
    """Raise WrongAnswerError where a token of states [P, D] has zeros only, which no final norm gives."""
    zeros = (states == 0).all(dim=1)
    if bool(zeros.any()):
        raise WrongAnswerError(
            f"vLLM gives hidden states of zeros for {name}: {int(zeros.sum())} of {len(states)} tokens (as on record "
            f"of hybrid models, vllm#46301); {ADVICE}"
        )


def _total_variation(a: Tensor, b: Tensor) -> float:
    """Mean over positions of half the sum of |p - q|; of log-probabilities [P, V]. NaN stays NaN."""
    return float((a.exp() - b.exp()).abs().sum(-1).mean()) / 2
