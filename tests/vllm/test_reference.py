"""What the probe prompts are compared with: prompt_logprobs of a second vLLM say what transformers says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.vllm_engine.checks import probe_prompts
from potstill.teacher_dump.engines.vllm_engine.pins import pins
from potstill.teacher_dump.engines.vllm_engine.reference import by_prompt_logprobs, by_transformers
from potstill.teacher_dump.engines.vllm_engine.vllm_runner import Devices

pytest.importorskip("vllm", reason="no vLLM here: `make test-vllm` installs it into an environment of its own")
CPU = torch.device("cpu")


def test_prompt_logprobs_are_those_of_transformers(shared_data: Path) -> None:
    teacher = TeacherConfig(model=shared_data / "models" / "teacher-7m", engine="vllm")
    prompts = probe_prompts(8192, 512)
    told = by_prompt_logprobs(teacher, prompts, dtype="float32", devices=Devices(CPU), row_length=512)
    exact = by_transformers(teacher, prompts, dtype="float32", device=CPU)
    assert told.bound == exact.bound == 2e-4
    for length, ids, others in zip((8, 61, 128, 61), told.ids, exact.ids, strict=True):
        assert ids.shape == (length - 1, 64)
        same = [set(a.tolist()) == set(b.tolist()) for a, b in zip(ids, others, strict=False)]
        assert sum(same) >= 0.99 * len(same)
    # As the engine would see them: the dense distributions of transformers, and those of the token before.
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher.model, dtype=torch.float32).eval()
    with torch.no_grad():
        dense = [model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in prompts]
    assert told.distance(dense) < 1e-5 and told.distance([one.roll(1, 0) for one in dense]) > 0.3


def test_what_run_json_pins(shared_data: Path) -> None:
    teacher = TeacherConfig(model=shared_data / "models" / "teacher-7m", engine="vllm")
    found = pins(teacher, dtype="bfloat16")
    assert found["dtype"] == "bfloat16" and found["implementation"] == "vllm" and found["quantization"] is None
    assert found["architecture"] == "LlamaForCausalLM" and {"vllm", "torch", "transformers"} <= found.keys()
    options = {"model_impl": "transformers", "kv_cache_dtype": "fp8"}
    other = pins(teacher.model_copy(update={"load_options": options}), dtype="float32")
    assert other["implementation"] == "transformers" and other["kv_cache_dtype"] == "fp8"
