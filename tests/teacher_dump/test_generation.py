"""Continuations: what transformers continues with, in any batch, with or without padding, up to a stop or a limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.common.errors import UserError
from potstill.teacher_dump.rollouts.generation import Asked, Sampling, can_pad, continue_prompts

VOCAB, POSITIONS, STOPS = 64, 18, frozenset({5, 6})
SAMPLING = Sampling(vocab_size=VOCAB, temperature=0.7, top_p=0.9, seed=3)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, llama: Path) -> Any:
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    if request.param == "llama":
        return AutoModelForCausalLM.from_pretrained(llama).eval()
    torch.manual_seed(0)
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **settings)).eval()


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    """Greedy and sampled continuations of prompts of several lengths, with limits of their own."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, size).astype(np.int32) for size in (3, 7, 5, 5, 9, 1)]
    return [Asked(prompt, 11 * n, k, 4 + n) for n, prompt in enumerate(prompts) for k in (None, 0, 1, 2)]


def run(model: Any, asked: list[Asked], *, batch: int = 64, padded: bool = True, **changes: Any) -> list[list[int]]:
    options = {"sampling": SAMPLING, "stop_ids": STOPS} | changes
    return [found.tolist() for found in continue_prompts(model, asked, batch=batch, padded=padded, **options)]


def test_no_batch_changes_a_continuation(model: Any, asked: list[Asked]) -> None:
    whole = run(model, asked)
    for length in (2, POSITIONS):  # never more positions than a row has, which may be all that the model reads
        assert can_pad(model, vocab_size=VOCAB, row_length=length) == (length > 2)
    assert run(model, asked[::-1], batch=5, padded=False)[::-1] == run(model, asked, batch=7) == whole
    # Alone: of each prompt one, greedy ones and samples.
    assert [run(model, [one])[0] for one in asked[::5]] == whole[::5]
    assert run(model, asked, sampling=Sampling(vocab_size=VOCAB, seed=4)) != whole


def test_greedy_is_what_transformers_gives(model: Any, asked: list[Asked]) -> None:
    for one, found in zip(asked, run(model, asked), strict=True):
        assert 1 <= len(found) <= one.limit and not STOPS & set(found[:-1])
        assert len(found) == one.limit or found[-1] in STOPS
        if one.number is None:
            ids = torch.from_numpy(one.prompt.astype(np.int64))[None]
            options: dict[str, Any] = {"do_sample": False, "eos_token_id": sorted(STOPS), "pad_token_id": 0}
            wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=one.limit, **options)
            assert found == wanted[0, len(one.prompt) :].tolist()


def test_samples_are_draws_from_the_model(model: Any) -> None:
    """First tokens of many samples of one prompt, in the shares of the softmax of a plain forward."""
    prompt = np.array([8, 1, 30], np.int32)
    count = 600
    found = run(
        model,
        [Asked(prompt, 0, number, 1) for number in range(count)],
        batch=count,
        sampling=Sampling(vocab_size=VOCAB, temperature=2.0),
    )
    with torch.no_grad():
        logits = model(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, -1]
    wanted = (logits / 2.0).softmax(-1).numpy()
    shares = np.bincount([ids[0] for ids in found], minlength=VOCAB) / count
    assert (np.abs(shares - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / count) + 1e-3).all()


def test_padding_of_the_head_is_never_taken(model: Any, asked: list[Asked]) -> None:
    small = run(model, asked, sampling=Sampling(vocab_size=16, temperature=3.0))
    assert max(max(ids) for ids in small) < 16


def test_logits_that_are_no_numbers_are_refused(model: Any, asked: list[Asked]) -> None:
    weight = model.get_output_embeddings().weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[3] = float("nan")
    try:
        with pytest.raises(UserError, match="the logits after token 0 of a continuation of unit 55 are not finite"):
            run(model, asked)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
