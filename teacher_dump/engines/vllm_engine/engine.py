"""Engine `vllm`: vLLM runs the model up to its final norm, the head is applied here.

Each document is a prompt of its own, whatever `teacher.documents` says: packed and apart mean the same. Tensor
parallelism is inside vLLM, so that one process is one worker, however many GPUs it has.

Legend: M target positions of a batch, D hidden size, V output rows of the head.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.base import Head, HiddenStates, TopKWanted
from potstill.teacher_dump.engines.hf import make_current
from potstill.teacher_dump.engines.vllm_engine.checkpoint_head import read_checkpoint_head
from potstill.teacher_dump.engines.vllm_engine.checks import RunnerCheck, check_no_zeros, probe_prompts
from potstill.teacher_dump.engines.vllm_engine.prompts import Prompt, at_targets, prompts_of
from potstill.teacher_dump.engines.vllm_engine.reference import Reference, take_reference
from potstill.teacher_dump.engines.vllm_engine.runner import ADVICE, PromptRunner, WrongAnswerError, ask
from potstill.teacher_dump.engines.vllm_engine.vllm_runner import choose_devices, import_vllm, start_runner
from potstill.teacher_dump.identity import computing_dtype, load_config, weights_folder
from potstill.teacher_dump.placing import local_device_index

log = logging.getLogger(__name__)

_CHECK_EVERY = 16  # batches: one prompt of such a batch is sent twice
_LOG_SECONDS = 60.0


class VllmEngine:
    """See TeacherEngine. Checks its runner when it is made: raises WrongAnswerError where that cannot be trusted."""

    name = "vllm"

    def __init__(
        self, runner: PromptRunner, *, head: Head, dtype: str, loose: bool = False, reference: Reference | None = None
    ) -> None:
        self.runner, self.head, self.dtype = runner, head, dtype
        self.device = head.weight.device
        self.vocab_size, self.hidden_size = head.weight.shape
        self._check = RunnerCheck(runner=runner, head=head, loose=loose)
        self._spread = self._check.run(reference)
        self._counted_before = runner.tokens_counted()
        self._began = self._logged = time.monotonic()
        self._batches, self._tokens, self._seconds = 0, 0, 0.0

    @torch.no_grad()
    def forward(self, batch: TeacherBatch) -> HiddenStates:
        """Hidden states at the batch's target positions. Raises WrongAnswerError."""
        prompts = prompts_of(batch)
        if not prompts:
            return HiddenStates(self.head.weight.new_zeros(0, self.hidden_size), self.head)
        twice = self._pick(prompts)
        sent = [prompt.ids for prompt in prompts] + ([] if twice is None else [prompts[twice].ids])
        names = [prompt.where for prompt in prompts] + ([] if twice is None else [f"{prompts[twice].where}, again"])
        began = time.perf_counter()
        states = ask(self.runner, sent, self.hidden_size, names=names)
        self._seconds += time.perf_counter() - began
        self._tokens += sum(map(len, sent))
        if twice is not None:
            self._compare(prompts[twice], states[twice], states.pop(), len(sent))
        hidden = at_targets(prompts, states).to(self.device)
        check_no_zeros(hidden, f"rows {batch.rows[0].row} to {batch.rows[-1].row}")
        self._log_speed()
        return HiddenStates(hidden, self.head)

    def idle_pass(self) -> None:
        """Nothing to do: there is no group."""

    def notes(self) -> Mapping[str, Any]:
        """What vLLM's workers say that they run."""
        return self.runner.notes()

    def speed(self) -> str:
        """Prompt tokens per second, of the call and by vLLM's own count."""
        text = (
            f"engine vllm: {self._tokens / max(self._seconds, 1e-9):,.0f} prompt tokens/s inside of vLLM's encode "
            f"({self._tokens:,} tokens in {self._seconds:.1f} s, measured around the call)"
        )
        counted = self.runner.tokens_counted()
        if counted is None or self._counted_before is None:
            return f"{text}; vLLM keeps no count of its own"
        counted, seconds = counted - self._counted_before, time.monotonic() - self._began
        return (
            f"{text}; by vLLM's own counter {counted:,} tokens, {counted / max(seconds, 1e-9):,.0f} tokens/s of the "
            f"{seconds:.1f} s since it was ready, the time between calls with them"
        )

    def _pick(self, prompts: list[Prompt]) -> int | None:
        """Which prompt of this batch is sent twice, at its place and last: each in its turn; None: none."""
        number, self._batches = self._batches, self._batches + 1
        return None if number % _CHECK_EVERY else (number // _CHECK_EVERY * 7) % len(prompts)

    def _compare(self, prompt: Prompt, first: Tensor, second: Tensor, count: int) -> None:
        if text := self._check.agree(first, second, self._spread):
            raise WrongAnswerError(
                f"vLLM gave two answers to one prompt ({prompt.where}) that was sent twice among {count}: {text}. "
                f"Answers may have been mixed up since the check before, {_CHECK_EVERY} batches ago; units committed "
                f"meanwhile should be compared with the teacher (potstill verify --teacher); {ADVICE}"
            )

    def _log_speed(self) -> None:
        if time.monotonic() - self._logged > _LOG_SECONDS:
            self._logged = time.monotonic()
            log.info("%s", self.speed())


def load(teacher: TeacherConfig, wanted: TopKWanted | None = None, *, row_length: int | None = None) -> VllmEngine:
    """Load the head here and the model into vLLM, and check what comes out of it. Raises UserError."""
    import_vllm()
    from vllm.platforms import current_platform

    devices = choose_devices(
        teacher,
        local_rank=local_device_index(),
        num_gpus=torch.cuda.device_count(),
        platform=str(current_platform.device_type),
    )
    config = load_config(teacher)
    dtype = computing_dtype(teacher, config)
    quantised = is_quantised(teacher, config)
    make_current(devices.device)
    head = read_checkpoint_head(weights_folder(teacher), config, dtype=getattr(torch, dtype), device=devices.device)
    longest = row_length or int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 1 << 10)
    reference = take_reference(
        teacher,
        probe_prompts(head.weight.shape[0], longest),
        dtype=dtype,
        devices=devices,
        quantised=quantised,
        row_length=row_length,
    )
    runner = start_runner(teacher, devices, dtype=dtype, row_length=row_length)
    loose = quantised or has_experts(config)
    return VllmEngine(runner, head=head, dtype=dtype, loose=loose, reference=reference)


def is_quantised(teacher: TeacherConfig, config: Any) -> bool:
    """Whether vLLM computes this teacher from quantised weights, by its checkpoint or by an option."""
    asked = ("quantization", "quantization_config")
    saved = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    return bool(saved) or any(teacher.load_options.get(key) for key in asked)


def has_experts(config: Any) -> bool:
    """Whether the model chooses experts for each token."""
    text = config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(text, name, None) or 0) > 1 for name in names)
