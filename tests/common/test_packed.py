"""Documents in packed rows stay apart under an attention that takes no mask, as flash attention does."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from potstill.common.packed import as_lines

NAME = "flash_attention_by_its_contract"


def by_contract(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What transformers does with flash attention without a mask: restarts count in a batch of one line only."""
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    cuts = [0, query.shape[2]]
    if query.shape[0] == 1:
        starts = (kwargs["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        cuts = sorted({*starts, *cuts})
    parts = [
        F.scaled_dot_product_attention(
            *(tensor[:, :, first:last] for tensor in (query, key, value)), is_causal=True, scale=kwargs["scaling"]
        )
        for first, last in pairwise(cuts)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    AttentionInterface.register(NAME, by_contract)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    yield
    AttentionInterface._global_mapping.pop(NAME)
    AttentionMaskInterface._global_mapping.pop(NAME)


def llama(attention: str) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=50, num_hidden_layers=2, initializer_range=0.3, **sizes)
    model = LlamaForCausalLM(config).double().eval()
    model.config._attn_implementation = attention  # by its setter, transformers would look for a package
    return model


def test_rows_of_several_documents_give_the_logits_of_masked_attention() -> None:
    ids = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(1))
    lengths = ([5, 7], [12], [1, 4, 7])
    places = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in lengths])
    expected = llama("sdpa")(input_ids=ids, position_ids=places, use_cache=False).logits
    model = llama(NAME)
    leaking = model(input_ids=ids, position_ids=places, use_cache=False).logits
    assert not torch.allclose(leaking, expected), "the attention of this test must need as_lines"
    lines = as_lines(model.config, ids, places)
    assert lines[0].shape == (1, 36)
    found = model(input_ids=lines[0], position_ids=lines[1], use_cache=False).logits
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-10, atol=1e-10)


def test_masked_attention_keeps_its_lines() -> None:
    ids, places = torch.zeros(2, 3, dtype=torch.int64), torch.arange(3).expand(2, 3)
    assert as_lines(llama("sdpa").config, ids, places) == (ids, places)
