"""Engine `vllm_logprobs`: what vLLM tells of prompts, for teachers whose hidden states cannot be had (MLA, and models
that vLLM does not pool).

Only the best log-probabilities at T = 1 and the label's with its rank are told: there are no draws, no entropies and no
tails at other temperatures. Each document is a prompt of its own, whatever `teacher.documents` says.

Legend: M target positions of a batch, P tokens of a prompt, R best ids told of each position.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.base import TopKWanted, TopLogprobs
from potstill.teacher_dump.engines.top_logprobs import Told, top_logprobs
from potstill.teacher_dump.engines.vllm_engine.prompts import Prompt, prompts_of
from potstill.teacher_dump.engines.vllm_engine.vllm_runner import choose_devices, import_vllm
from potstill.teacher_dump.engines.vllm_logprobs.runner import Answer, LogprobsRunner, Question, ask
from potstill.teacher_dump.engines.vllm_logprobs.small_reference import small_reference
from potstill.teacher_dump.engines.vllm_logprobs.start_checks import check_at_start
from potstill.teacher_dump.engines.vllm_logprobs.vllm_runner import start_logprobs_runner
from potstill.teacher_dump.identity import computing_dtype, load_config
from potstill.teacher_dump.placing import local_device_index

# Ids asked for beyond k: equals of the k-th, rows of the output layer beyond the tokenizer, and the least of a tail.
SPARE = 16


class VllmLogprobsEngine:
    """See TeacherEngine."""

    name = "vllm_logprobs"
    device = torch.device("cpu")  # where its answers are

    def __init__(self, runner: LogprobsRunner, *, wanted: TopKWanted, dtype: str) -> None:
        self.runner, self.wanted, self.dtype = runner, wanted, dtype
        self.vocab_size = runner.head_size
        self.num_best = min(wanted.k + SPARE, runner.head_size)
        self._tokens, self._seconds = 0, 0.0

    @torch.no_grad()
    def forward(self, batch: TeacherBatch) -> TopLogprobs:
        """The best log-probabilities at the batch's target positions. Raises WrongAnswerError and UserError."""
        prompts = prompts_of(batch)
        labels = torch.from_numpy(batch.labels)
        ends = torch.tensor([len(prompt.targets) for prompt in prompts], dtype=torch.int64).cumsum(0)
        questions = [
            Question(prompt.ids, int(labels[end - 1])) for prompt, end in zip(prompts, ends.tolist(), strict=True)
        ]
        names = [prompt.where for prompt in prompts]
        began = time.perf_counter()
        answers = ask(self.runner, questions, self.num_best, names=names) if questions else []
        self._seconds += time.perf_counter() - began
        self._tokens += sum(len(prompt.ids) for prompt in prompts)
        return top_logprobs(self._told(prompts, answers, labels), self.wanted, engine=self.name)

    def _told(self, prompts: Sequence[Prompt], answers: Sequence[Answer], labels: torch.Tensor) -> Told:
        """What was told at the targets [M] of all prompts."""

        def joined(name: str, *more: int, dtype: torch.dtype) -> torch.Tensor:
            parts = [
                getattr(answer, name)[torch.from_numpy(prompt.targets)]
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
            return torch.cat([torch.empty(0, *more, dtype=dtype), *parts])

        return Told(
            ids=joined("best", self.num_best, dtype=torch.int64),
            logprobs=joined("logprobs", self.num_best, dtype=torch.float32),
            labels=labels,
            label_logprob=joined("label_logprob", dtype=torch.float32),
            at_or_above=joined("label_rank", dtype=torch.int64) - 1,
        )

    def notes(self) -> Mapping[str, Any]:
        """What it runs, for the record of each unit; plain values."""
        return self.runner.notes()

    def speed(self) -> str:
        """Its speed so far, in words for the log."""
        return f"engine {self.name}: {self._tokens / max(self._seconds, 1e-9):,.0f} tokens/s, {self.num_best} ids each"

    def idle_pass(self) -> None:
        """Nothing to do: there is no group."""


def load(
    teacher: TeacherConfig, wanted: TopKWanted | None = None, *, row_length: int | None = None
) -> VllmLogprobsEngine:
    """Load the model into vLLM and see that it tells what it should. Raises UserError where it does not."""
    assert wanted is not None, "the configuration refuses to draw from log-probabilities"
    import_vllm()
    from vllm.platforms import current_platform

    devices = choose_devices(
        teacher,
        local_rank=local_device_index(),
        num_gpus=torch.cuda.device_count(),
        platform=str(current_platform.device_type),
    )
    dtype = computing_dtype(teacher, load_config(teacher))
    runner = start_logprobs_runner(teacher, devices, dtype=dtype, row_length=row_length)
    engine = VllmLogprobsEngine(runner, wanted=wanted, dtype=dtype)
    check_at_start(
        runner, wanted, num_best=engine.num_best, dtype=getattr(torch, dtype), reference=small_reference(teacher)
    )
    return engine
