"""Runners of prompts for engine `vllm` without vLLM: an honest one made of a transformers model, and lies about it.

The lies take prompts and answers and give other answers, so they stand around vLLM itself as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from potstill.common.causal_lm import backbone
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.base import Head, TopKWanted
from potstill.teacher_dump.engines.table import EngineEntry
from potstill.teacher_dump.engines.vllm_engine.checkpoint_head import read_checkpoint_head
from potstill.teacher_dump.engines.vllm_engine.checks import probe_prompts
from potstill.teacher_dump.engines.vllm_engine.engine import VllmEngine
from potstill.teacher_dump.engines.vllm_engine.reference import Reference, by_transformers
from potstill.teacher_dump.engines.vllm_engine.runner import Answer, PromptRunner
from potstill.teacher_dump.identity import load_config

Lie = Callable[[Sequence[list[int]], list[Answer]], list[Answer]]
LIES: list[Lie] = []  # that `load` puts around its runner
PINS = {"runner": "transformers", "version": "1"}
ENTRY = EngineEntry(
    module=__name__,
    description="prompts through transformers",
    mixes=True,
    takes_row_length=True,
    pins=__name__,
    refuses={"compile": (True,), "head": ("logits",)},
)


class HonestRunner:
    """See PromptRunner. Each prompt is a forward pass of its own; `of` says which states it gives."""

    def __init__(self, model: Any, *, longest: int, of: str = "final") -> None:
        self.model, self.longest, self.at_once, self.of = model, longest, 600, of
        self.dtype = next(model.parameters()).dtype
        self.count = 0

    @torch.inference_mode()
    def hidden_states(self, prompts: Sequence[list[int]]) -> list[Answer]:
        self.count += sum(map(len, prompts))
        return [Answer(list(ids), self._states(torch.tensor([ids]))) for ids in prompts]

    def _states(self, ids: torch.Tensor) -> torch.Tensor:
        body = backbone(self.model)
        before: list[torch.Tensor] = []
        hook = body.norm.register_forward_pre_hook(lambda module, given: before.append(given[0]))
        output = body(input_ids=ids, use_cache=False, output_hidden_states=True)
        hook.remove()
        return {
            "final": lambda: output[0][0],
            "before the norm": lambda: before[0][0],
            "the layer before": lambda: body.norm(output.hidden_states[-2])[0],
        }[self.of]()

    def notes(self) -> Mapping[str, Any]:
        return {"model": type(self.model).__name__, "attention": ["sdpa"]}

    def tokens_counted(self) -> int | None:
        return self.count


@dataclass
class Liar:
    """A runner whose answers are changed on their way."""

    honest: PromptRunner
    lies: Sequence[Lie]
    dtype: torch.dtype = field(init=False)
    longest: int = field(init=False)
    at_once: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.dtype, self.longest, self.at_once = self.honest.dtype, self.honest.longest, self.honest.at_once

    def hidden_states(self, prompts: Sequence[list[int]]) -> list[Answer]:
        answers = self.honest.hidden_states(prompts)
        for lie in self.lies:
            answers = lie(prompts, answers)
        return answers

    def notes(self) -> Mapping[str, Any]:
        return self.honest.notes()

    def tokens_counted(self) -> int | None:
        return self.honest.tokens_counted()


def zeros(prompts: Sequence[list[int]], answers: list[Answer]) -> list[Answer]:
    """Of hybrid models, vllm#46301."""
    return [replace(answer, states=torch.zeros_like(answer.states)) for answer in answers]


def zeros_at_the_end(prompts: Sequence[list[int]], answers: list[Answer]) -> list[Answer]:
    """The last token of each prompt is never written."""
    return [
        replace(answer, states=torch.cat([answer.states[:-1], torch.zeros_like(answer.states[-1:])]))
        for answer in answers
    ]


def others(prompts: Sequence[list[int]], answers: list[Answer]) -> list[Answer]:
    """The whole answers of other requests, as they come out of a queue that was sorted anew: vllm#45734."""
    return [answers[-1], *answers[:-1]]


def states_of_others(prompts: Sequence[list[int]], answers: list[Answer]) -> list[Answer]:
    """The states of the next request of the same length under the ids of one's own: speculators#279."""
    lengths = [len(prompt) for prompt in prompts]
    found = []
    for number, answer in enumerate(answers):
        same = [other for other, length in enumerate(lengths) if length == lengths[number]]
        other = same[(same.index(number) + 1) % len(same)]
        found.append(replace(answer, states=answers[other].states))
    return found


def short_of_a_token(prompts: Sequence[list[int]], answers: list[Answer]) -> list[Answer]:
    """A token is missing from the last answer where many are asked for at once: speculators#613."""
    if len(answers) < 4:
        return answers
    return [*answers[:-1], replace(answers[-1], states=answers[-1].states[1:])]


def fewer_answers(prompts: Sequence[list[int]], answers: list[Answer]) -> list[Answer]:
    """The last request is lost."""
    return answers[:-1] if len(answers) > 3 else answers


def stale_pieces(prompts: Sequence[list[int]], answers: list[Answer]) -> list[Answer]:
    """Where many tokens are asked for at once, the end of a prompt has the states of its beginning."""
    if sum(map(len, prompts)) <= 500:
        return answers
    half = len(answers[-1].states) // 2
    stale = torch.cat([answers[-1].states[:-half], answers[-1].states[:half]])
    return [*answers[:-1], replace(answers[-1], states=stale)]


def before_the_norm(prompts: Sequence[list[int]], answers: list[Answer]) -> list[Answer]:
    """Each token at a length of its own, as a residual stream has it: Model-Optimizer#1846."""
    return [replace(one, states=one.states * torch.linspace(2.0, 6.0, len(one.states))[:, None]) for one in answers]


def one_for_all(prompts: Sequence[list[int]], answers: list[Answer]) -> list[Answer]:
    """Every token has the state of the first."""
    return [replace(answer, states=answer.states[:1].expand_as(answer.states)) for answer in answers]


def pins(teacher: TeacherConfig, *, dtype: str) -> Mapping[str, Any]:
    """What run.json says of this runner."""
    return PINS


def load(teacher: TeacherConfig, wanted: TopKWanted | None = None, *, row_length: int | None = None) -> VllmEngine:
    """The engine of the model in the folder `teacher.model`, as engine.load makes it, with a runner of this file."""
    from transformers import AutoModelForCausalLM

    assert row_length is not None
    model = AutoModelForCausalLM.from_pretrained(teacher.model, dtype=torch.float32).eval()
    head, reference = head_and_reference(teacher, row_length, torch.float32)
    runner = Liar(HonestRunner(model, longest=row_length), LIES)
    return VllmEngine(runner, head=head, dtype="float32", reference=reference)


def head_and_reference(teacher: TeacherConfig, longest: int, dtype: torch.dtype) -> tuple[Head, Reference]:
    """What an engine of the model in the folder `teacher.model` is made with, besides its runner."""
    cpu = torch.device("cpu")
    head = read_checkpoint_head(Path(teacher.model), load_config(teacher), dtype=dtype, device=cpu)
    prompts = probe_prompts(head.weight.shape[0], longest)
    name = str(dtype).removeprefix("torch.")
    return head, by_transformers(teacher, prompts, dtype=name, device=cpu)
