"""Experts, latent attention, further heads, caps and scales through vLLM, from random weights, against engine hf.

Each model in a process of its own: vLLM's way of running transformers' models changes their classes for good.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.common.errors import UserError
from potstill.teacher_dump.batches import packed_batch
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.head import apply_head
from potstill.teacher_dump.engines.loading import load_engine
from tests.teacher_dump.odd_models import (
    EXPERTS,
    HEADS,
    add_prediction_layer,
    change_weights,
    deepseek_v3,
    gemma2,
    saved,
    with_tokenizer,
)
from tests.teacher_dump.test_odd_teachers import apart, total_variation
from tests.teacher_dump.tiny import ROW_LENGTH, make_tokens, token_rows

# Tokens of the longest document, as vLLM is told: its checks take prompts up to that. In fewer tokens than this, how
# bfloat16 routes is chance.
PROBED = 64

pytest.importorskip("vllm", reason="no vLLM here: `make test-vllm` installs it into an environment of its own")


@dataclass(frozen=True)
class Found:
    """What vLLM gives of a model: how far from float32 and from transformers' own run in bfloat16."""

    exact: float  # largest difference in float32 over the largest logit
    implementation: str
    lost: float | None = None  # mean total variation between bfloat16 by vLLM and float32
    lost_by_hf: float | None = None  # the same by transformers


def logits_by(folder: Path, tokens: Path, **settings: Any) -> torch.Tensor:
    """Logits [M, V] float64 of packed rows."""
    engine = load_engine(TeacherConfig(model=folder, **settings), row_length=PROBED)
    output: Any = engine.forward(packed_batch(token_rows(tokens), length=ROW_LENGTH))
    return apply_head(output.hidden, output.head).double()


def compare(folder: Path, tokens: Path, attention: str | None, options: dict[str, Any], bfloat16: bool) -> Found:
    """In a process of its own; all that transformers does comes first."""
    by_vllm = {"engine": "vllm", "load_options": options}
    expected = logits_by(folder, tokens, dtype="float32", attention=attention)
    plain = apart(folder, tokens, "bfloat16") if bfloat16 else None
    if bfloat16:
        found = logits_by(folder, tokens, dtype="bfloat16", **by_vllm)
        return Found(0, "", total_variation(found, expected), total_variation(plain, expected))
    engine: Any = load_engine(TeacherConfig(model=folder, dtype="float32", **by_vllm), row_length=PROBED)
    output = engine.forward(packed_batch(token_rows(tokens), length=ROW_LENGTH))
    found = apply_head(output.hidden, output.head).double()
    return Found(float((found - expected).abs().max() / expected.abs().max()), engine.runner.notes()["model"])


def apart_from_hf(
    folder: Path, tokens: Path, *, attention: str | None = None, bfloat16: bool = False, **options: Any
) -> Found:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(compare, folder, tokens, attention, options, bfloat16).result(timeout=300)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokens(tmp_path_factory.mktemp("tokens") / "store")


# vLLM 0.32's own DeepSeek-V3 is wrong on a CPU, which the checks at the start refuse; transformers' runs in it.
OPTIONS = {"deepseek-v3": {"model_impl": "transformers"}}


@pytest.mark.parametrize("name", [*HEADS, *EXPERTS])
def test_a_random_model_gives_what_hf_gives(name: str, tokens: Path, tmp_path: Path) -> None:
    folder = with_tokenizer(saved({**HEADS, **EXPERTS}[name], tmp_path / "model"))
    if name == "deepseek-v3":
        change_weights(folder, add_prediction_layer)  # which both must leave out
    # Gemma 2 caps the scores of its attention, which the default of this version of transformers leaves out.
    attention = "eager" if "gemma2" in name else None
    found = apart_from_hf(folder, tokens, attention=attention, **OPTIONS.get(name, {}))
    assert found.exact <= 5e-5
    assert name != "deepseek-v3" or found.implementation.startswith("Transformers")


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_in_bfloat16_are_as_near_as_those_of_transformers(name: str, tokens: Path, tmp_path: Path) -> None:
    """By distributions: where two experts are nearly even, bfloat16 takes one or the other."""
    folder = with_tokenizer(saved(EXPERTS[name], tmp_path / "model"))
    found = apart_from_hf(folder, tokens, bfloat16=True, **OPTIONS.get(name, {}))
    assert found.lost is not None and found.lost_by_hf is not None
    assert 0 < found.lost_by_hf < 0.05 and found.lost <= 2 * found.lost_by_hf


def test_wrong_states_of_an_implementation_are_refused_and_another_named(tokens: Path, tmp_path: Path) -> None:
    """vLLM 0.32 on a CPU: its own DeepSeek-V3 gives a prompt other states beside another prompt."""
    folder = with_tokenizer(saved(deepseek_v3, tmp_path / "model"))
    with pytest.raises(UserError, match=r"load_options\.model_impl=transformers"):
        apart_from_hf(folder, tokens)


def test_the_cap_that_transformers_leaves_out_is_refused(tmp_path: Path) -> None:
    """In the version that vLLM pins; later ones take eager attention by themselves."""
    folder = saved(gemma2, tmp_path / "model")
    with pytest.raises(UserError, match=r"caps the scores of its attention at 50.*set teacher.attention=eager"):
        load_engine(TeacherConfig(model=folder))
