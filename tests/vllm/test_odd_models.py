"""Experts, latent attention, further heads, caps and scales through vLLM, from random weights, against engine hf."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.teacher_dump.batches import packed_batch
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.head import apply_head
from potstill.teacher_dump.engines.loading import load_engine
from tests.teacher_dump.odd_models import (
    EXPERTS,
    HEADS,
    saved,
    with_tokenizer,
)
from tests.teacher_dump.test_odd_teachers import apart, total_variation
from tests.teacher_dump.tiny import ROW_LENGTH, make_tokens, token_rows

pytest.importorskip("vllm", reason="no vLLM here: `make test-vllm` installs it into an environment of its own")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokens(tmp_path_factory.mktemp("tokens") / "store")


@pytest.fixture(autouse=True)
def _one_engine_at_a_time() -> Iterator[None]:
    yield
    gc.collect()


def logits_by(folder: Path, tokens: Path, **settings: Any) -> torch.Tensor:
    """Logits [M, V] float64 of packed rows."""
    engine = load_engine(TeacherConfig(model=folder, **settings), row_length=ROW_LENGTH)
    output: Any = engine.forward(packed_batch(token_rows(tokens), length=ROW_LENGTH))
    return apply_head(output.hidden, output.head).double()


def apart_at_most(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest logit of b."""
    return float((a - b).abs().max() / b.abs().max())


def cap_kept(name: str) -> dict[str, str]:
    """Gemma 2 caps the scores of its attention, which transformers' default leaves out in this version."""
    return {"attention": "eager"} if "gemma2" in name else {}


@pytest.mark.parametrize("name", [*HEADS, *EXPERTS])
def test_a_random_model_gives_what_hf_gives(name: str, tokens: Path, tmp_path: Path) -> None:
    folder = with_tokenizer(saved({**HEADS, **EXPERTS}[name], tmp_path / "model"))
    expected = logits_by(folder, tokens, dtype="float32", **cap_kept(name))
    assert apart_at_most(logits_by(folder, tokens, engine="vllm", dtype="float32"), expected) <= 5e-5


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_in_bfloat16_are_as_near_as_those_of_transformers(name: str, tokens: Path, tmp_path: Path) -> None:
    """By distributions: where two experts are nearly even, bfloat16 takes one or the other."""
    folder = with_tokenizer(saved(EXPERTS[name], tmp_path / "model"))
    truth, plain = apart(folder, tokens), apart(folder, tokens, "bfloat16")
    cost = total_variation(plain, truth)
    found = logits_by(folder, tokens, engine="vllm", dtype="bfloat16")
    assert 0 < cost < 0.05 and total_variation(found, truth) <= 2 * cost
