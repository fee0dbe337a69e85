"""The head that engine vllm reads from a checkpoint by name, and what it says where there is none to read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from potstill.common.errors import UserError
from potstill.teacher_dump.engines.head import apply_head, head_agrees
from potstill.teacher_dump.engines.vllm_engine.checkpoint_head import read_checkpoint_head
from tests.teacher_dump.tiny import save_llama, save_model

CPU = torch.device("cpu")


def read(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    return read_checkpoint_head(folder, config, dtype=dtype, device=CPU)


def capped(folder: Path) -> Path:
    """Tied embeddings and a soft cap."""
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=30.0,
    )
    return save_model(Gemma2ForCausalLM(config), folder)


@pytest.mark.parametrize(
    "save",
    [save_llama, lambda folder: save_llama(folder, tie_word_embeddings=True), capped],
    ids=["its own", "tied", "tied and capped"],
)
def test_the_head_is_that_of_transformers(tmp_path: Path, save: Callable[[Path], Path]) -> None:
    folder = save(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for place in (folder, tmp_path / "shards"):
        head = read(place, AutoConfig.from_pretrained(place))
        assert head_agrees(model, head, 64) < 1e-6
    assert read(folder, model.config, torch.bfloat16).weight.dtype == torch.bfloat16


def config_of(vocab_size: int = 6, *, tied: bool = False, **settings: Any) -> Any:
    text = SimpleNamespace(vocab_size=vocab_size, tie_word_embeddings=tied, **settings)
    return SimpleNamespace(get_text_config=lambda: text)


def test_bias_and_scale_of_the_main_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 4), torch.randn(6)
    other = torch.randn(6, 4)
    tensors = {
        "lm_head.weight": weight,
        "lm_head.bias": bias,
        "model.embed_tokens.weight": other,
        # Of multi-token prediction: a layer with embeddings and a head of its own.
        "model.layers.3.embed_tokens.weight": other.clone(),
        "model.layers.3.lm_head.weight": other.clone(),
        "mtp.lm_head.weight": other.clone(),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    head = read(tmp_path, config_of(logits_scaling=4.0))
    hidden = torch.randn(3, 4)
    torch.testing.assert_close(apply_head(hidden, head), (hidden @ weight.T + bias) / 4.0)
    with pytest.raises(UserError, match=r"ties the head to model\.embed_tokens, and the checkpoint holds a lm_head"):
        read(tmp_path, config_of(tied=True))


REFUSALS = {
    "quantised beside": (
        {"lm_head.weight": torch.zeros(6, 4), "lm_head.weight_scale_inv": torch.ones(1)},
        "lm_head.we",
    ),
    "gptq": (
        {"lm_head.qweight": torch.zeros(6, 4, dtype=torch.int32)},
        r"quantised \(lm_head.qweight stands beside it",
    ),
    "fp8": ({"lm_head.weight": torch.zeros(6, 4).to(torch.float8_e4m3fn)}, r"quantised \(its type is float8_e4m3fn\)"),
    "int8": ({"lm_head.weight": torch.zeros(6, 4, dtype=torch.int8)}, r"quantised \(its type is int8\)"),
    "short": ({"lm_head.weight": torch.zeros(5, 4)}, r"lm_head.weight is \[5, 4\], expected 6 rows"),
    "long": ({"lm_head.weight": torch.zeros(12, 4)}, r"lm_head.weight is \[12, 4\], expected 6 rows"),
    "none": ({"model.norm.weight": torch.zeros(4)}, "holds no head: expected the weight of a layer named lm_head"),
    "two": ({"a.lm_head.weight": torch.zeros(6, 4), "b.lm_head.weight": torch.zeros(6, 4)}, "a.lm_head, b.lm_head"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_head_that_cannot_be_applied_is_refused_by_name(tmp_path: Path, name: str) -> None:
    tensors, text = REFUSALS[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=text):
        read(tmp_path, config_of())


def test_files_that_are_not_there_or_broken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \*\.safetensors"):
        read(tmp_path, config_of())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    with pytest.raises(UserError, match=r"lm_head.weight cannot be read from gone\.safetensors"):
        read(tmp_path, config_of())
    index.write_text("{")
    with pytest.raises(UserError, match="its list of tensors cannot be read"):
        read(tmp_path, config_of())
