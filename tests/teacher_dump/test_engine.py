"""Engine hf: a packed row gives what its documents give apart, for every way a head can be built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.common.errors import UserError
from potstill.teacher_dump.batches import TeacherBatch, apart_batch, packed_batch, restart_positions
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.base import HiddenStates, Logits, TeacherEngine
from potstill.teacher_dump.engines.head import apply_head
from potstill.teacher_dump.engines.loading import load_engine
from potstill.teacher_dump.engines.table import ENGINES
from tests.teacher_dump.tiny import ROW_LENGTH, VOCAB, save_llama, save_model, token_rows

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, sliding_window=4, final_logit_softcapping=5.0))


def _mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SMALL, head_dim=8, sliding_window=3))


def _cohere() -> Any:
    from transformers import CohereConfig, CohereForCausalLM

    return CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def _granite() -> Any:
    from transformers import GraniteConfig, GraniteForCausalLM

    return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0))


def _phi() -> Any:
    from transformers import PhiConfig, PhiForCausalLM

    model = PhiForCausalLM(PhiConfig(**SMALL))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def _tied_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    # maker, what the head must be found to have
    "llama, tied": (_tied_llama, {}),
    "mistral, sliding window": (_mistral, {}),
    "gemma2, soft cap": (_gemma2, {"soft_cap": 5.0}),
    "cohere, logit scale": (_cohere, {"logit_scale": 0.25}),
    "granite, logits divided": (_granite, {"logit_scale": 0.25}),
    "phi, bias": (_phi, {"bias": True}),
    "gpt2, learned positions": (_gpt2, {}),
}


def logits_of(engine: TeacherEngine, batch: TeacherBatch) -> np.ndarray:
    output = engine.forward(batch)
    if isinstance(output, Logits):
        return output.logits.double().numpy()
    assert isinstance(output, HiddenStates)
    return apply_head(output.hidden, output.head).double().numpy()


def apart_logits(folder: Path, tokens: Path) -> np.ndarray:
    """The truth: each document alone through transformers, logits at all but its last token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for row in token_rows(tokens):
        for document in torch.from_numpy(row.tokens).long().split(row.doc_lens.tolist()):
            with torch.no_grad():
                found.append(model(input_ids=document[None]).logits[0, :-1].double())
    return torch.cat(found).numpy()


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_give_what_they_give_apart(name: str, tokens: Path, tmp_path: Path) -> None:
    make, expected_head = MODELS[name]
    torch.manual_seed(0)
    folder = save_model(make(), tmp_path / "model", sharpen=4.0)
    truth = apart_logits(folder, tokens)
    rows = token_rows(tokens)
    for attention in ("eager",) if name.startswith("gemma2") else ("eager", "sdpa"):
        engine = load_engine(TeacherConfig(model=folder, attention=attention, head="hidden"))
        assert engine.head is not None
        for key, value in expected_head.items():
            found = getattr(engine.head, key)
            assert found is not None if value is True else found == pytest.approx(value)
        logits = logits_of(engine, packed_batch(rows, length=ROW_LENGTH))
        assert logits.shape == truth.shape
        np.testing.assert_allclose(logits, truth, atol=2e-5 * np.abs(truth).max())
    engine = load_engine(TeacherConfig(model=folder, head="logits", documents="apart"))
    assert engine.head is None
    np.testing.assert_allclose(logits_of(engine, apart_batch(rows)), truth, atol=2e-5 * np.abs(truth).max())


def test_batch_size_and_padding_do_not_change_a_row(llama: Path, tokens: Path) -> None:
    engine = load_engine(TeacherConfig(model=llama))
    rows = token_rows(tokens)
    whole = logits_of(engine, packed_batch(rows, length=ROW_LENGTH))
    single = [logits_of(engine, packed_batch([row], length=ROW_LENGTH + 5)) for row in rows]
    np.testing.assert_allclose(np.concatenate(single), whole, atol=2e-5 * np.abs(whole).max())


def test_layout_of_a_batch() -> None:
    lens = np.array([1, 3, 2], np.int32)
    assert restart_positions(lens).tolist() == [0, 0, 1, 2, 0, 1]
    assert restart_positions(np.zeros(0, np.int32)).tolist() == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "auto"])
def test_dtype_is_what_is_asked_for(dtype: str, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    engine = load_engine(TeacherConfig(model=folder, dtype=dtype))  # type: ignore[arg-type]
    assert engine.dtype == ("float32" if dtype == "auto" else dtype)
    assert engine.name == "hf" and engine.vocab_size == VOCAB and engine.name in ENGINES


def test_a_model_that_ignores_positions_is_refused_packed_and_works_apart(tokens: Path, tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4))
    folder = save_model(model, tmp_path / "mamba", sharpen=1.0)
    with pytest.raises(UserError, match=r"does not keep packed documents apart.*set documents=apart"):
        load_engine(TeacherConfig(model=folder))
    engine = load_engine(TeacherConfig(model=folder, documents="apart"))
    truth = apart_logits(folder, tokens)
    logits = logits_of(engine, apart_batch(token_rows(tokens)))
    np.testing.assert_allclose(logits, truth, atol=2e-5 * np.abs(truth).max())


def test_a_head_that_does_not_agree_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    folder = save_llama(tmp_path / "model")
    forward = LlamaForCausalLM.forward

    def capped(self: Any, *args: Any, **options: Any) -> Any:
        output = forward(self, *args, **options)
        output.logits = output.logits.clamp(-0.1, 0.1)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", capped)
    assert load_engine(TeacherConfig(model=folder)).head is None
    with pytest.raises(UserError, match="logits that are not head"):
        load_engine(TeacherConfig(model=folder, head="hidden"))


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable model configuration"):
        load_engine(TeacherConfig(model=tmp_path))
    folder = save_llama(tmp_path / "model")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_engine(TeacherConfig(model=folder, attention="no_such_backend"))
    with pytest.raises(UserError, match="device 'cuda:99'"):
        load_engine(TeacherConfig(model=folder, device="cuda:99"))
