"""What run.json says of vLLM itself; see vllm_engine/pins.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.vllm_engine.pins import pins_of
from potstill.teacher_dump.engines.vllm_logprobs.vllm_runner import telling_arguments


def pins(teacher: TeacherConfig, *, dtype: str) -> Mapping[str, Any]:
    """Versions, and what vLLM makes of the teacher's settings. Raises UserError where it refuses them."""
    arguments = telling_arguments(teacher, dtype=dtype, row_length=None)
    head = {"head_dtype": str(arguments["hf_overrides"]["head_dtype"])}
    return {**pins_of(teacher, arguments), **head}
