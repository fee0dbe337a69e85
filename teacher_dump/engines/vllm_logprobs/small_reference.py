"""The same teacher by transformers, where it is small enough to be loaded a second time for one look."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.vllm_logprobs.runner import Question
from potstill.teacher_dump.engines.vllm_logprobs.start_checks import Reference
from potstill.teacher_dump.identity import load_config, weights_folder

log = logging.getLogger(__name__)

_MOST_BYTES = 1 << 30  # of weight files


def small_reference(teacher: TeacherConfig) -> Reference | None:
    """See Reference; float32 on the CPU. None, and said in the log, for a large model or a quantised one."""
    files = list(weights_folder(teacher).glob("*.safetensors"))
    num_bytes = sum(file.stat().st_size for file in files)
    quantised = getattr(load_config(teacher), "quantization_config", None) is not None
    if not files or num_bytes > _MOST_BYTES or quantised:
        why = "is quantised" if quantised else f"has {num_bytes / 1e9:.1f} GB of safetensors"
        log.info("engine vllm_logprobs: not compared with transformers, because the teacher %s", why)
        return None
    return lambda questions: _by_transformers(teacher, questions)


@torch.no_grad()
def _by_transformers(teacher: TeacherConfig, questions: Sequence[Question]) -> list[Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        weights_folder(teacher),
        dtype=torch.float32,
        trust_remote_code=bool(teacher.load_options.get("trust_remote_code", False)),
    ).eval()
    return [model(torch.tensor([question.ids])).logits[0].log_softmax(-1) for question in questions]
