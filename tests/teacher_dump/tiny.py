"""Small real things for the tests of this room: tokens stores, tokenizers and models made on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from potstill.storage import RunSpec, StoreReader, StoreWriter, TokensRow, seal_store

VOCAB, ROW_LENGTH = 64, 16
TOKENIZER_DIGEST = "made by a test"


def make_tokens(
    path: Path,
    rows: Sequence[Sequence[int]] = ((16,), (3, 13), (1, 1, 14), (5, 6, 5), (10, 6), (2, 4, 1)),
    *,
    vocab_size: int = VOCAB,
    row_length: int = ROW_LENGTH,
    rows_per_unit: int = 2,
    seed: int = 0,
    masks: Sequence[np.ndarray | None] | None = None,
) -> Path:
    """Sealed tokens store; `rows` gives the document lengths of each row, token ids are random.

    masks: of each row, bool [n] or None (all on), for a store with masks.
    """
    rng = np.random.default_rng(seed)
    spec = RunSpec(
        kind="tokens",
        row_length=row_length,
        rows_per_unit=rows_per_unit,
        num_rows=None,
        vocab_size=vocab_size,
        tokenizer_digest=TOKENIZER_DIGEST,
        columns=() if masks is None else ("mask",),
    )
    writer = StoreWriter.create(path, spec)
    made = [
        TokensRow(number, rng.integers(0, vocab_size, sum(lens)).astype(np.int32), np.array(lens, np.int32), mask)
        for number, (lens, mask) in enumerate(zip(rows, masks or [None] * len(rows), strict=True))
    ]
    for unit, first in enumerate(range(0, len(made), rows_per_unit)):
        writer.commit_unit(unit, made[first : first + rows_per_unit])
    seal_store(path)
    return path


def token_rows(path: Path) -> list[TokensRow]:
    reader = StoreReader(path)
    rows = reader.rows(range(reader.num_rows))
    return [row for row in rows if isinstance(row, TokensRow)]


def save_llama(folder: Path, *, vocab_size: int = VOCAB, seed: int = 0, sharpen: float = 20.0, **settings: Any) -> Path:
    """A random Llama of 2 layers; `sharpen` scales its head so that distributions are far from uniform."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
        }
        | settings
    )
    return save_model(LlamaForCausalLM(config), folder, sharpen=sharpen)


def save_model(model: Any, folder: Path, *, sharpen: float = 20.0) -> Path:
    import torch

    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(sharpen)
    model.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, texts: Sequence[str], *, field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(folder: Path, template: str | None = CHAT_TEMPLATE) -> Path:
    """A byte-level tokenizer with a few words, the tokens <|im_start|> and <|im_end|>, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the still, the pot and the mash: the worm runs"] * 5, trainer=trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = template
    made.save_pretrained(folder)
    return folder


def some_texts(count: int, *, seed: int = 0) -> list[str]:
    """Different short English-like texts, some of them empty or of one word."""
    rng = np.random.default_rng(seed)
    words = ["still", "pot", "copper", "the", "mash", "runs", "slow", "and", "clear", "through", "worm", "é", "酒"]
    lengths = rng.integers(0, 40, count)
    return [" ".join([f"n{i}", *rng.choice(words, length)]) if length else "" for i, length in enumerate(lengths)]
