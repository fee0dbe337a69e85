"""Engine `vllm_logprobs`: what vLLM tells of prompts, for teachers whose hidden states cannot be had (MLA, and models
that vLLM does not pool).

Only the best log-probabilities at T = 1 and the label's with its rank are told: there are no draws, no entropies and no
tails at other temperatures. Each document is a prompt of its own, whatever `teacher.documents` says.

Legend: M target positions of a batch, P tokens of a prompt, R best ids told of each position.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from potstill.common.errors import UserError
from potstill.common.model_place import one_line
from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.base import TopKWanted, TopLogprobs
from potstill.teacher_dump.engines.top_logprobs import Told, top_logprobs
from potstill.teacher_dump.engines.vllm_engine.engine import has_experts, is_quantised
from potstill.teacher_dump.engines.vllm_engine.prompts import Prompt, prompts_of
from potstill.teacher_dump.engines.vllm_engine.reference import SMALL_BYTES, Reference, by_transformers
from potstill.teacher_dump.engines.vllm_engine.runner import ADVICE, WrongAnswerError
from potstill.teacher_dump.engines.vllm_engine.vllm_runner import choose_devices, import_vllm
from potstill.teacher_dump.engines.vllm_logprobs.runner import Answer, LogprobsRunner, Question, ask
from potstill.teacher_dump.engines.vllm_logprobs.start_checks import check_at_start, probe_pair
from potstill.teacher_dump.engines.vllm_logprobs.vllm_runner import start_logprobs_runner
from potstill.teacher_dump.identity import computing_dtype, load_config, weights_folder
from potstill.teacher_dump.placing import local_device_index

log = logging.getLogger(__name__)

# Ids asked for beyond k: equals of the k-th, rows of the output layer beyond the tokenizer, and the least of a tail.
SPARE = 16
CHECK_EVERY = 16  # batches: one prompt of such a batch is sent twice


class VllmLogprobsEngine:
    """See TeacherEngine. Checks its runner when it is made: raises UserError where that cannot be trusted."""

    name = "vllm_logprobs"
    device = torch.device("cpu")  # where its answers are

    def __init__(
        self,
        runner: LogprobsRunner,
        *,
        wanted: TopKWanted,
        dtype: str,
        loose: bool = False,
        reference: Reference | None = None,
    ) -> None:
        self.runner, self.wanted, self.dtype = runner, wanted, dtype
        self.vocab_size = runner.head_size
        self.num_best = min(wanted.k + SPARE, runner.head_size)
        self._near = check_at_start(
            runner,
            wanted,
            num_best=self.num_best,
            dtype=getattr(torch, dtype),
            loose=loose,
            reference=reference,
        )
        self._batches, self._tokens, self._seconds = 0, 0, 0.0

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
        twice = self._pick(questions)
        sent = [*questions, *(questions[number] for number in twice)]
        names += [f"{names[number]}, again" for number in twice]
        answers = ask(self.runner, sent, self.num_best, names=names) if sent else []
        self._seconds += time.perf_counter() - began
        self._tokens += sum(len(question.ids) for question in sent)
        for number in twice:
            self._compare(names[number], answers[number], answers.pop(), len(sent))
        return top_logprobs(self._told(prompts, answers, labels), self.wanted, engine=self.name)

    def _pick(self, questions: Sequence[Question]) -> list[int]:
        """Which prompt of this batch, if any, is sent twice, at its place and last: each in its turn."""
        number, self._batches = self._batches, self._batches + 1
        return [] if number % CHECK_EVERY or not questions else [number // CHECK_EVERY * 7 % len(questions)]

    def _compare(self, name: str, first: Answer, second: Answer, count: int) -> None:
        finite = not bool(first.label_logprob.isnan().any() or second.label_logprob.isnan().any())
        if finite and (text := self._near.same(first, second, head_size=self.vocab_size)):
            raise WrongAnswerError(
                f"vLLM gave two answers to one prompt ({name}) that was sent twice among {count}: {text}. Answers may "
                f"have been mixed up since the check before, {CHECK_EVERY} batches ago; units committed meanwhile "
                f"should be made again; {ADVICE}"
            )

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
    config = load_config(teacher)
    dtype, quantised = computing_dtype(teacher, config), is_quantised(teacher, config)
    longest = (row_length or int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 1 << 10)) - 1
    reference = None if quantised else _reference(teacher, wanted, longest, dtype=dtype, device=devices.device)
    runner = start_logprobs_runner(teacher, devices, dtype=dtype, row_length=row_length)
    try:
        return VllmLogprobsEngine(
            runner, wanted=wanted, dtype=dtype, loose=quantised or has_experts(config), reference=reference
        )
    except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:  # of vLLM, at the first prompt
        raise UserError(f"teacher {teacher.model!r} is loaded and cannot be run by vLLM: {one_line(error)}") from error


def _reference(
    teacher: TeacherConfig, wanted: TopKWanted, longest: int, *, dtype: str, device: torch.device
) -> Reference | None:
    """What transformers says of the probes, before vLLM takes the memory; None, as the log says, for a large one."""
    num_bytes = sum(file.stat().st_size for file in weights_folder(teacher).glob("*.safetensors"))
    if num_bytes > SMALL_BYTES:
        log.info(
            "engine vllm_logprobs: the teacher has %.1f GiB, and is not compared with transformers", num_bytes / 2**30
        )
        return None
    prompts = [question.ids for question in probe_pair(wanted.vocab_size, longest)]
    try:
        return by_transformers(teacher, prompts, dtype=dtype, device=device)
    except UserError as error:
        log.warning("engine vllm_logprobs: not compared with transformers, which cannot run the teacher (%s)", error)
        return None
