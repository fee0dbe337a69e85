"""Rows of real text with the tokenizer that made them, a teacher over them, and tokenizers made from that one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from potstill.common.config import build_config
from potstill.storage import StoreReader, StoreWriter, seal_store
from potstill.teacher_dump import prepare
from potstill.teacher_dump.config import PrepareConfig
from tests.student_train import tiny

VOCAB, NUM_NEW = 300, 3
NEW = [f"<|new{number}|>" for number in range(NUM_NEW)]
WORDS = ("the", "still", "draws", "spirit", "from", "wash", "and", "grain,", "barley", "by", "barley;", "old", "copper")
Change = Callable[[dict[str, Any]], None]


def bigram_table(seed: int = 0) -> np.ndarray:
    """Log-probabilities [V, V] of a made-up teacher."""
    logits = np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)) * 2
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def write_stores(place: Path) -> dict[str, Path]:
    """Tokens and targets to train on and held out, under `place`, in the names of tiny.config_tree."""
    rng = np.random.default_rng(2)
    texts = [" ".join(rng.choice(WORDS, size=60)) for _ in range(60)]
    place.mkdir(parents=True, exist_ok=True)
    (place / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = {"input": [str(place / "text.jsonl")], "output": str(place / "data"), "row_length": tiny.ROW_LENGTH}
    values |= {"train_tokenizer": {"vocab_size": VOCAB}, "heldout_fraction": 0.2}
    prepare(build_config(PrepareConfig, values, source="test"))
    stores = {"tokens": place / "data" / "train", "heldout": place / "data" / "heldout"}
    for name, tokens in (("teacher", "tokens"), ("heldout_teacher", "heldout")):
        reader, stores[name] = StoreReader(stores[tokens]), place / name
        spec = tiny.spec_of(
            "targets",
            num_rows=reader.num_rows,
            vocab_size=reader.spec.vocab_size,
            tokenizer_digest=reader.spec.tokenizer_digest,
            rows_per_unit=reader.num_rows,
            input_digest=reader.digest,
            selection={"mode": "top_k", "k": tiny.TOP_K},
            temperatures=(2.0,),
            stats=("mean_loss", "mean_entropy"),
            teacher={"id": "bigram", "weights_digest": "0" * 64, "dtype": "float32", "engine": "table"},
        )
        table, rows = bigram_table(), reader.tokens_rows(range(reader.num_rows))
        writer = StoreWriter.create(stores[name], spec)
        writer.commit_unit(0, [tiny.targets_row(row, table, temperatures=(2.0,)) for row in rows])
        seal_store(stores[name])
    return stores


def changed_tokenizer(source: Path, output: Path, change: Change) -> Path:
    """A copy of a tokenizer folder whose tokenizer.json went through `change`."""
    shutil.copytree(source, output)
    file = output / "tokenizer.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    change(whole)
    file.write_text(json.dumps(whole), encoding="utf-8")
    return output


def add_tokens(whole: dict[str, Any]) -> None:
    """Further special tokens behind all others."""
    first = max(whole["model"]["vocab"].values()) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    whole["added_tokens"] += [{"id": first + number, "content": text, **flags} for number, text in enumerate(NEW)]


def renumber(whole: dict[str, Any]) -> None:
    """Every token, the added ones too, under another id."""
    vocab, added = whole["model"]["vocab"], whole["added_tokens"]
    texts = sorted({*vocab, *(token["content"] for token in added)})
    order = np.random.default_rng(4).permutation(len(texts))
    number = {text: int(place) for text, place in zip(texts, order, strict=True)}
    whole["model"]["vocab"] = {text: number[text] for text in sorted(vocab, key=number.__getitem__)}
    for token in added:
        token["id"] = number[token["content"]]


def without(lost: set[str]) -> Change:
    """Drop these tokens and the merges that make or use them, and close the gaps."""

    def change(whole: dict[str, Any]) -> None:
        vocab, added = whole["model"]["vocab"], whole["added_tokens"]
        numbers = {**vocab, **{token["content"]: token["id"] for token in added}}
        kept = [text for text in sorted(numbers, key=numbers.__getitem__) if text not in lost]
        number = {text: place for place, text in enumerate(kept)}
        whole["model"]["vocab"] = {text: number[text] for text in kept if text in vocab}
        for token in added:
            token["id"] = number[token["content"]]
        pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in whole["model"]["merges"]]
        whole["model"]["merges"] = [pair for pair in pairs if not lost & {*pair, "".join(pair)}]

    return change


def halve_merges(whole: dict[str, Any]) -> None:
    """The same tokens, of which half are never made."""
    whole["model"]["merges"] = whole["model"]["merges"][: len(whole["model"]["merges"]) // 2]
