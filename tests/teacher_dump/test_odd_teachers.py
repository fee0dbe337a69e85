"""Teachers of other kinds through engine hf: experts, further heads, output rows of other numbers, tied and padded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.common.errors import UserError
from potstill.storage import StoreReader
from potstill.teacher_dump import DumpConfig, dump
from potstill.teacher_dump.batches import packed_batch
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.head import apply_head
from potstill.teacher_dump.engines.hf import HfEngine
from potstill.teacher_dump.engines.loading import load_engine
from potstill.teacher_dump.engines.vllm_engine.checkpoint_head import read_checkpoint_head
from potstill.teacher_dump.identity import load_config
from tests.teacher_dump.odd_models import (
    EXPERTS,
    add_prediction_layer,
    change_weights,
    deepseek_v3,
    gemma2,
    llama,
    mixtral,
    saved,
)
from tests.teacher_dump.tiny import ROW_LENGTH, VOCAB, make_tokens, token_rows
from tests.teacher_dump.truth import dense_truth

WIDTH = 64


def logits_by(folder: Path, tokens: Path, **settings: Any) -> torch.Tensor:
    """Logits [M, V] float64 of packed rows through engine hf."""
    engine = load_engine(TeacherConfig(model=folder, **settings))
    output: Any = engine.forward(packed_batch(token_rows(tokens), length=ROW_LENGTH))
    return (output.logits if hasattr(output, "logits") else apply_head(output.hidden, output.head)).double()


def apart(folder: Path, tokens: Path, dtype: str = "float32") -> torch.Tensor:
    """Logits [M, V] float64 of each document alone, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    documents = [
        document
        for row in token_rows(tokens)
        for document in torch.from_numpy(row.tokens).long().split(row.doc_lens.tolist())
    ]
    with torch.no_grad():
        return torch.cat([model(input_ids=document[None]).logits[0, :-1].double() for document in documents])


def total_variation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over positions of the total variation of softmax(a) and softmax(b)."""
    return float((a.softmax(-1) - b.softmax(-1)).abs().sum(-1).mean() / 2)


@pytest.mark.parametrize("name", EXPERTS)
def test_a_mixture_of_experts_packed_gives_what_its_documents_give_apart(
    name: str, tokens: Path, tmp_path: Path
) -> None:
    folder = saved(EXPERTS[name], tmp_path / "model")
    truth = apart(folder, tokens)
    for head in ("hidden", "logits"):
        found = logits_by(folder, tokens, head=head)
        assert float((found - truth).abs().max()) <= 2e-5 * float(truth.abs().max())
    # In bfloat16 a token may be routed to another expert in another batch: judged by distributions, against what
    # bfloat16 itself costs.
    plain = apart(folder, tokens, "bfloat16")
    cost = total_variation(plain, truth)
    assert total_variation(logits_by(folder, tokens, head="hidden", dtype="bfloat16"), plain) <= cost
    assert 0 < cost < 0.05


def test_one_token_that_another_expert_takes_is_no_mixing_of_documents(tmp_path: Path) -> None:
    """A flip in one line of ids is let pass, of experts only; documents that see one another are refused."""
    for make, experts in ((mixtral, True), (llama, False)):
        folder = saved(make, tmp_path / make.__name__)
        settings = TeacherConfig(model=folder)
        model = load_engine(settings).model  # type: ignore[attr-defined]
        layer = model.model.layers[0].mlp
        calls = 0

        def once(module: Any, inputs: Any, output: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                output = output.clone()
                output[0, 7] += 10 * output.abs().max()
            return output

        handle = layer.register_forward_hook(once)
        if experts:
            assert HfEngine(model, teacher=settings, device=torch.device("cpu")).head is not None
        else:
            with pytest.raises(UserError, match="does not keep packed documents apart"):
                HfEngine(model, teacher=settings, device=torch.device("cpu"))
        handle.remove()

        def on_and_on(module: Any, inputs: Any, options: dict[str, Any]) -> Any:
            places = torch.arange(options["position_ids"].shape[1])[None].expand_as(options["position_ids"])
            return inputs, options | {"position_ids": places}

        model.register_forward_pre_hook(on_and_on, with_kwargs=True)
        with pytest.raises(UserError, match="does not keep packed documents apart"):
            HfEngine(model, teacher=settings, device=torch.device("cpu"))


def test_layers_of_multi_token_prediction_are_left_out_and_named(
    tokens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(deepseek_v3, tmp_path / "model", num_nextn_predict_layers=1)
    with caplog.at_level("INFO"):
        alone = logits_by(folder, tokens)
        assert "multi-token" not in caplog.text
        change_weights(folder, add_prediction_layer)
        found = logits_by(folder, tokens)
    assert torch.equal(found, alone)
    assert "of its weights (model.layers.3." in caplog.text and "targets are of the main head" in caplog.text
    assert "have no place" not in caplog.text


def test_weights_without_a_place_in_the_model_are_named(
    tokens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(llama, tmp_path / "model")
    change_weights(folder, lambda weights: weights.update({"lm_head.bias": torch.randn(VOCAB)}))
    load_engine(TeacherConfig(model=folder))
    assert "1 weights of its checkpoint (lm_head.bias) have no place in LlamaForCausalLM" in caplog.text


@pytest.mark.parametrize(
    ("rows", "advice"),
    [
        (2 * VOCAB, "if these are 2 heads of multi-token prediction, keep the 64 rows of the one"),
        (VOCAB + 8, "set vocab_size to 72 in config.json"),
        (VOCAB - 4, "fetch the checkpoint again, or correct its config.json"),
    ],
)
def test_an_output_layer_of_other_rows_than_the_configuration_is_refused_with_both(
    rows: int, advice: str, tmp_path: Path
) -> None:
    folder = saved(llama, tmp_path / "model")
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": torch.randn(rows, WIDTH)}))
    for options in ({}, {"ignore_mismatched_sizes": True}):  # transformers would take random numbers
        with pytest.raises(UserError) as error:
            load_engine(TeacherConfig(model=folder, load_options=options))
        assert f"lm_head.weight is [{rows}, 64] in the checkpoint, config.json asks for [64, 64]" in str(error.value)
        assert advice in str(error.value) and ("multi" in str(error.value)) == (rows == 2 * VOCAB)
    with pytest.raises(UserError, match=rf"lm_head.weight is \[{rows}, 64\], expected 64 rows"):
        read_checkpoint_head(
            folder, load_config(TeacherConfig(model=folder)), dtype=torch.float32, device=torch.device("cpu")
        )


def several_heads(shape: str) -> tuple[type, type]:
    """Configuration and model of a Llama with two heads in one output layer; `shape`: flat [.., 2 V], or [.., 2, V]."""
    from transformers import LlamaConfig, LlamaForCausalLM

    class SeveralConfig(LlamaConfig):
        model_type = f"several_{shape}"

    class SeveralForCausalLM(LlamaForCausalLM):
        config_class = SeveralConfig
        _tied_weights_keys: Any = None

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.lm_head = torch.nn.Linear(config.hidden_size, 2 * config.vocab_size, bias=False)
            self.post_init()

        def forward(self, *args: Any, **options: Any) -> Any:
            output = super().forward(*args, **options)
            if shape == "apart":
                output.logits = output.logits.unflatten(-1, (2, -1))
            return output

    return SeveralConfig, SeveralForCausalLM


def test_of_several_heads_in_one_output_layer_the_first_is_used(
    tokens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = saved(llama, tmp_path / "plain")
    truth = apart(plain, tokens)
    for shape in ("flat", "apart"):
        config, model = several_heads(shape)
        AutoConfig.register(config.model_type, config, exist_ok=True)  # type: ignore[attr-defined]
        AutoModelForCausalLM.register(config, model, exist_ok=True)
        keys = json.loads((plain / "config.json").read_text())
        made = model(config(**{key: value for key, value in keys.items() if key != "model_type"}))
        state = load_file(plain / "model.safetensors")
        state["lm_head.weight"] = torch.cat([state["lm_head.weight"], torch.randn(VOCAB, WIDTH)])
        made.load_state_dict(state)
        made.save_pretrained(tmp_path / shape)
    for head in ("hidden", "logits"):
        found = logits_by(tmp_path / "flat", tokens, head=head)
        assert float((found - truth).abs().max()) <= 2e-5 * float(truth.abs().max())
    assert "has 128 output rows, its vocab_size is 64: targets are of the first 64" in caplog.text
    for settings in ({}, {"head": "logits"}):
        with pytest.raises(UserError, match=r"gives logits \[1, 12, 2, 64\] for ids \[1, 12\].*the head of the next"):
            load_engine(TeacherConfig(model=tmp_path / "apart", **settings))


def test_attention_that_leaves_out_a_cap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some versions of transformers take it by themselves, others refuse it: here they all take it."""
    from transformers import Gemma2PreTrainedModel

    folder = saved(gemma2, tmp_path / "model")
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    with pytest.raises(UserError, match=r"caps the scores of its attention at 50.*set teacher.attention=eager"):
        load_engine(TeacherConfig(model=folder, attention="sdpa"))
    assert load_engine(TeacherConfig(model=folder, attention="eager")).vocab_size == VOCAB


def test_a_checkpoint_with_a_head_of_its_own_is_not_tied(tokens: Path, tmp_path: Path) -> None:
    """Whatever its configuration says: transformers goes by the weights. vLLM does not, so its engine refuses them."""
    folder = saved(llama, tmp_path / "model")
    truth = apart(folder, tokens)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    assert torch.equal(logits_by(folder, tokens), logits_by(saved(llama, tmp_path / "untied"), tokens))
    assert float((logits_by(folder, tokens) - truth).abs().max()) <= 2e-5 * float(truth.abs().max())
    options: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    config = load_config(TeacherConfig(model=folder))
    with pytest.raises(UserError, match=r"ties the head to model.embed_tokens.* lm_head.weight of other values"):
        read_checkpoint_head(folder, config, **options)
    # As some save it: the same values twice.
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] + 0}))
    head = load_engine(TeacherConfig(model=folder)).head  # type: ignore[attr-defined]
    assert torch.equal(read_checkpoint_head(folder, config, **options).weight, head.weight)


def test_a_tied_capped_and_padded_head_is_dumped_as_its_tokenizer_ends(tmp_path: Path) -> None:
    ids, temperature = 50, 2.0
    tokens = make_tokens(tmp_path / "tokens", vocab_size=ids)
    folder = saved(gemma2, tmp_path / "model")
    settings = {"model": folder, "check_tokenizer": False}
    store = tmp_path / "out"
    dump(
        DumpConfig(
            tokens=tokens,
            output=store,
            teacher=settings,
            selection={"mode": "top_k", "k": 8},
            temperatures=[temperature],
        )
    )
    rows: Any = StoreReader(store).rows(range(6))
    for row, truths in zip(rows, dense_truth(folder, tokens, vocab_size=ids), strict=True):
        targets = row.targets
        for place, truth in enumerate(truths):
            if truth.label is None:
                continue
            here = slice(*targets.offsets[place : place + 2])
            kept = targets.ids[here]
            assert len(kept) == 8 and kept.max() < ids
            np.testing.assert_allclose(targets.logprobs[here], truth.logprobs[kept], atol=1 / 32 + 1e-4)
            assert targets.log_tail_at[temperature][place] == pytest.approx(
                truth.log_tail(kept, temperature), abs=1 / 16
            )
            assert set(kept.tolist()) == set(truth.order[:8].tolist())
