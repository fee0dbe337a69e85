"""A student that mixes documents, or has other logits than the loss, is refused before it takes a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.common.errors import UserError
from potstill.student_train.model.checks import check_model, document_leak, probe_batch, probe_documents
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.model.student import StudentModel, build_student
from potstill.student_train.run.metrics import read_metrics
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers

LENGTH = 96
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Sliding windows shorter than a document, shorter than the row, and longer than both.
APART: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2, window 3": ("gemma2", {"head_dim": 16, "sliding_window": 3, "final_logit_softcapping": 5.0}),
    "gemma2, window 50": ("gemma2", {"head_dim": 16, "sliding_window": 50}),
    "gemma3, window 3": ("gemma3_text", {"head_dim": 16, "sliding_window": 3}),
    "mistral, window 3": ("mistral", {"head_dim": 16, "sliding_window": 3}),
    "mistral, window 50": ("mistral", {"head_dim": 16, "sliding_window": 50}),
    "mistral, window 4096": ("mistral", {"head_dim": 16, "sliding_window": 4096}),
    "granite, logits divided": ("granite", {"logits_scaling": 3.0}),
    "cohere, logits scaled": ("cohere", {"logit_scale": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "num_experts": 4, "head_dim": 16}),
}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MIXING: dict[str, dict[str, Any]] = {
    "falcon": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "lfm2": {"full_attn_idxs": [1]},
    "qwen3_next": {**EXPERTS, **LINEAR, "num_experts": 4, "shared_expert_intermediate_size": 24, "head_dim": 16},
    "jamba": {"num_experts": 2, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
}


def student_of(kind: str, values: dict[str, Any], *, dtype: torch.dtype = torch.float32) -> StudentModel:
    attention = "eager" if kind == "gemma2" else "sdpa"
    sizes = {key: value for key, value in tiny.STUDENT.items() if key != "model_type"}
    tree = {
        "run": {"output_dir": "x", "max_steps": 1},
        "model": {
            "config": {**sizes, "max_position_embeddings": LENGTH, **values, "model_type": kind},
            "attention": attention,
        },
        "data": {"tokens": "x", "global_batch_rows": 1},
    }
    config = workers.config_of(tree).model
    return build_student(config, hf_config(config, vocab_size=tiny.VOCAB), seed=0).to(dtype)


def check(student: StudentModel) -> None:
    check_model(student, student, micro_batch_rows=2, row_length=LENGTH, vocab_size=tiny.VOCAB)


# The experts of transformers have no float64; test_moe.py compares them in float32.
@pytest.mark.parametrize("name", [name for name in APART if name != "qwen3_moe"])
def test_packed_documents_equal_documents_apart(name: str) -> None:
    student = student_of(*APART[name]).double().eval()
    doc_lens = np.array([5, 1, 30, 2, 58], np.int64)
    ids = (torch.arange(2 * LENGTH) * 31 % tiny.VOCAB).view(2, LENGTH)
    packed = student.hidden_states(probe_batch(ids, doc_lens))
    apart = [
        student.hf.base_model(input_ids=part[None], use_cache=False).last_hidden_state[0]
        for row in ids
        for part in row.split(doc_lens.tolist())
    ]
    torch.testing.assert_close(packed, torch.cat(apart), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", APART)
def test_models_that_keep_documents_apart_pass(name: str, dtype: torch.dtype) -> None:
    student = student_of(*APART[name], dtype=dtype)
    check(student)
    assert student.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MIXING)
def test_models_that_mix_documents_are_refused(kind: str, dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match=rf"a {kind} with attention sdpa does not keep the documents of a packed row"):
        check(student_of(kind, MIXING[kind], dtype=dtype))


def test_logits_that_the_loss_does_not_know_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def scaled(self: Any, *args: Any, **options: Any) -> Any:
        output = forward(self, *args, **options)
        output.logits = output.logits * 0.5
        return output

    student = student_of("llama", {})
    check(student)
    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(UserError, match="the logits of a llama are not those that the loss works on"):
        check(student)


def test_what_cannot_be_built_is_said_in_one_line() -> None:
    with pytest.raises(UserError, match="linear layer named lm_head"):
        student_of("llama4_text", {"num_local_experts": 2, "head_dim": 16})
    tree = {
        "run": {"output_dir": "x", "max_steps": 1},
        "model": {"config": {**tiny.STUDENT, "model_type": "gemma2", "head_dim": 16}},
        "data": {"tokens": "x", "global_batch_rows": 1},
    }
    config = workers.config_of(tree).model
    with pytest.raises(UserError, match=r"model\.attention sdpa"):
        build_student(config, hf_config(config, vocab_size=tiny.VOCAB), seed=0)


def test_short_rows_have_documents_too() -> None:
    assert probe_documents(6).tolist() == [4, 2]
    assert probe_documents(3).tolist() == [3]
    assert probe_documents(200).tolist() == [4] * 16 + [136]
    student = student_of("falcon", {})
    leak = document_leak(student, student.hf.lm_head, num_rows=1, row_length=6, vocab_size=tiny.VOCAB)
    assert leak > 0.01


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_of_two_ranks_is_refused_before_its_first_step(stores, tmp_path: Path, stage: int) -> None:
    tree = tiny.config_tree(stores, tmp_path / "run", zero_stage=stage)
    tree["model"] = {"config": {**tiny.STUDENT, **MIXING["falcon"], "model_type": "falcon"}, "dtype": "bfloat16"}
    with pytest.raises(AssertionError, match="does not keep the documents of a packed row apart"):
        run_ranks(workers.train_run, tree, world=2)
    assert read_metrics(tmp_path / "run") == []
