"""What run.json says of vLLM itself, from its own configuration; no weights are loaded for it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from potstill.common.errors import UserError
from potstill.common.model_place import one_line
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.vllm_engine.vllm_runner import import_vllm, pooling_arguments


def pins(teacher: TeacherConfig, *, dtype: str) -> Mapping[str, Any]:
    """Versions, and what vLLM makes of the teacher's settings. Raises UserError where it refuses them.

    `attention` is what was asked for; what the workers have taken is only known when they are loaded, and stands in the
    record of each unit.
    """
    vllm = import_vllm()
    from vllm.engine.arg_utils import EngineArgs

    try:
        config = EngineArgs(**pooling_arguments(teacher, dtype=dtype, row_length=None)).create_engine_config()
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, AssertionError) as error:
        raise UserError(
            f"teacher {teacher.model!r} is refused by vLLM {vllm.__version__}: {one_line(error)}"
        ) from error
    model = config.model_config
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization,
        "kv_cache_dtype": str(config.cache_config.cache_dtype),
        "tensor_parallel": teacher.tensor_parallel,
        "implementation": "transformers" if model.using_transformers_backend() else "vllm",
        "architecture": model.architecture,
        "attention": teacher.attention or "chosen by vLLM",
        "documents": "a prompt each",
    }
