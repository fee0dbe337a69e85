"""What tells log-probabilities without vLLM: a transformers model, one prompt at a time, in whole float32 softmaxes.

`ENTRY` is an engine of it with everything of engine `vllm_logprobs` but vLLM itself; it stands in no table, tests add
it. Tests spoil its answers by `SPOIL`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.base import TopKWanted
from potstill.teacher_dump.engines.table import EngineEntry
from potstill.teacher_dump.engines.vllm_logprobs.engine import VllmLogprobsEngine
from potstill.teacher_dump.engines.vllm_logprobs.runner import Answer, Question

ENTRY = EngineEntry(module=__name__, description="told by transformers", gives_top_k=True, only_logprobs=True)
Spoil = Callable[[Sequence[Question], list[Answer]], list[Answer]]
SPOIL: list[Spoil] = []


class TransformersRunner:
    """See LogprobsRunner."""

    at_once: int | None = 100

    def __init__(self, model: Any) -> None:
        self.model = model
        self.head_size = int(model.config.vocab_size)
        self.longest = int(model.config.max_position_embeddings) - 1

    @torch.no_grad()
    def logprobs(self, questions: Sequence[Question], num_best: int) -> list[Answer]:
        answers = [self._answer(question, num_best) for question in questions]
        for spoil in SPOIL:
            answers = spoil(questions, answers)
        return answers

    def _answer(self, question: Question, num_best: int) -> Answer:
        every = self.model(torch.tensor([question.ids])).logits[0].float().log_softmax(-1)  # [P, V]
        best, labels = every.topk(num_best), torch.tensor(question.labels)
        label_logprob = every.gather(1, labels[:, None])
        rank = (every >= label_logprob).sum(1)
        return Answer(list(question.ids), labels, label_logprob[:, 0], rank, best.indices, best.values)

    def notes(self) -> Mapping[str, Any]:
        return {}


def runner_of(folder: Any) -> TransformersRunner:
    """The runner of the model in a folder."""
    from transformers import AutoModelForCausalLM

    return TransformersRunner(AutoModelForCausalLM.from_pretrained(folder).eval())


def load(teacher: TeacherConfig, wanted: TopKWanted | None) -> VllmLogprobsEngine:
    """The engine of the model in the folder `teacher.model`."""
    assert wanted is not None
    return VllmLogprobsEngine(runner_of(teacher.model), wanted=wanted, dtype="float32")
