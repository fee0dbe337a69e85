"""Engine `vllm`: vLLM runs the model up to its final norm, the head is applied here.

Each document is a prompt of its own, whatever `teacher.documents` says: packed and apart mean the same. Tensor
parallelism is inside vLLM, so that one process is one worker, however many GPUs it has.

Legend: M target positions of a batch, D hidden size, V output rows of the head.
"""

from __future__ import annotations

import logging
import time

import torch

from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.base import Head, HiddenStates, TopKWanted
from potstill.teacher_dump.engines.hf import make_current
from potstill.teacher_dump.engines.vllm_engine.checkpoint_head import read_checkpoint_head
from potstill.teacher_dump.engines.vllm_engine.prompts import at_targets, prompts_of
from potstill.teacher_dump.engines.vllm_engine.runner import PromptRunner, ask
from potstill.teacher_dump.engines.vllm_engine.vllm_runner import choose_devices, import_vllm, start_runner
from potstill.teacher_dump.identity import computing_dtype, load_config, weights_folder
from potstill.teacher_dump.placing import local_device_index

log = logging.getLogger(__name__)


class VllmEngine:
    """See TeacherEngine."""

    name = "vllm"

    def __init__(self, runner: PromptRunner, *, head: Head, dtype: str) -> None:
        self.runner, self.head, self.dtype = runner, head, dtype
        self.device = head.weight.device
        self.vocab_size, self.hidden_size = head.weight.shape
        self._tokens, self._seconds = 0, 0.0

    @torch.no_grad()
    def forward(self, batch: TeacherBatch) -> HiddenStates:
        """Hidden states at the batch's target positions. Raises WrongAnswerError."""
        prompts = prompts_of(batch)
        if not prompts:
            return HiddenStates(self.head.weight.new_zeros(0, self.hidden_size), self.head)
        began = time.perf_counter()
        states = ask(
            self.runner,
            [prompt.ids for prompt in prompts],
            self.hidden_size,
            names=[prompt.where for prompt in prompts],
        )
        self._seconds += time.perf_counter() - began
        self._tokens += sum(len(prompt.ids) for prompt in prompts)
        hidden = at_targets(prompts, states).to(self.device)
        return HiddenStates(hidden, self.head)

    def idle_pass(self) -> None:
        """Nothing to do: there is no group."""


def load(teacher: TeacherConfig, wanted: TopKWanted | None = None, *, row_length: int | None = None) -> VllmEngine:
    """Load the head here and the model into vLLM. Raises UserError when that is not possible."""
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
    make_current(devices.device)
    head = read_checkpoint_head(weights_folder(teacher), config, dtype=getattr(torch, dtype), device=devices.device)
    runner = start_runner(teacher, devices, dtype=dtype, row_length=row_length)
    return VllmEngine(runner, head=head, dtype=dtype)
