"""A teacher in int8, weights and activations, as vLLM loads it: its own prompt_logprobs are what it is held to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.loading import load_engine

pytest.importorskip("vllm", reason="no vLLM here: `make test-vllm` installs it into an environment of its own")


def save_int8(teacher: Path, folder: Path) -> Path:
    """The same model in the layout of compressed-tensors: weights by output channel, activations by token."""
    shutil.copytree(teacher, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            scale = tensor.float().abs().amax(1, keepdim=True) / 127
            tensors[name] = (tensor.float() / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale.to(tensor.dtype)
        else:
            tensors[name] = tensor
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    one = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": one | {"strategy": "channel", "dynamic": False},
        "input_activations": one | {"strategy": "token", "dynamic": True},
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_quantised_teacher_runs_as_vllm_runs_it(
    shared_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_int8(shared_data / "models" / "teacher-7m", tmp_path / "int8")
    with caplog.at_level("INFO"):
        engine = load_engine(TeacherConfig(model=folder, engine="vllm", dtype="bfloat16"), row_length=512)
    assert engine.dtype == "bfloat16" and engine.vocab_size == 8192
    assert "because its weights are quantised" in caplog.text
    assert "head(hidden) against vLLM's own prompt_logprobs: mean total variation" in caplog.text
