"""Stores and a starting student that the tests of this room share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.student_train import tiny


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paths of the tiny stores."""
    return tiny.write_all(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="session")
def start_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tiny Llama, larger weights than usual so that gradients are not all alike."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(11)
    values = {key: value for key, value in tiny.STUDENT.items() if key != "model_type"}
    config = AutoConfig.for_model("llama", vocab_size=tiny.VOCAB, initializer_range=0.1, **values)
    folder = tmp_path_factory.mktemp("start") / "llama"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
