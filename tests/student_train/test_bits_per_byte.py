"""Bits per byte of held-out text: against a loop over the bytes of real text, multi-byte characters among them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from potstill.common.config import build_config
from potstill.common.errors import UserError
from potstill.storage import StoreReader
from potstill.student_train import evaluate
from potstill.student_train.config.train import EvalConfig
from potstill.student_train.evaluation.folder import EvalSummary
from potstill.teacher_dump import prepare
from potstill.teacher_dump.config import PrepareConfig
from tests.student_train import tiny

TEXTS = ["naïve café, 5€ — 日本語 👩‍🚀", "plain words, and plain words again", "Ünïcödé\n\n“quotes” …"]
VOCAB = 290


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of text with a byte-level tokenizer beside them, and a model over its ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    place = tmp_path_factory.mktemp("bits")
    (place / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS * 4) + "\n")
    values = {"input": [str(place / "text.jsonl")], "output": str(place / "data"), "row_length": 16}
    values |= {"train_tokenizer": {"vocab_size": VOCAB}}
    prepare(build_config(PrepareConfig, values, source="test"))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**tiny.STUDENT, "vocab_size": VOCAB})).save_pretrained(place / "model")
    return place


def measured(folder: Path, **changes: str | int) -> EvalSummary:
    values = {"model": str(folder / "model"), "heldout": str(folder / "data" / "train"), "num_threads": 1, **changes}
    return evaluate(build_config(EvalConfig, values, source="test"))


def by_hand(folder: Path, num_rows: int) -> float:
    """Sum of the losses in bits over the bytes of the labels' text, document by document."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(folder / "data" / "tokenizer" / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    reader = StoreReader(folder / "data" / "train")
    bits, num_bytes = 0.0, 0
    for number in range(num_rows):
        row, start = reader.row(number), 0
        for size in row.doc_lens:
            ids = row.tokens[start : start + size].tolist()
            start += size
            if size > 1:
                with torch.no_grad():
                    loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
                bits += float(loss) * (size - 1) / math.log(2)
            for token in ids[1:]:  # the alphabet of byte-level BPE writes one character per byte
                num_bytes += 0 if token == 0 else len(tokenizer.id_to_token(token))
    return bits / num_bytes


def test_bits_per_byte_is_that_of_a_loop_over_the_text(folder: Path, tmp_path: Path) -> None:
    num_rows = StoreReader(folder / "data" / "train").num_rows
    found = measured(folder, output=str(tmp_path / "e.json"))
    assert found.bits_per_byte == pytest.approx(by_hand(folder, num_rows), rel=1e-5)
    assert f"bits_per_byte  {found.bits_per_byte:.5g}" in found.format()
    written = json.loads((tmp_path / "e.json").read_text())
    assert written["bits_per_byte"] == found.bits_per_byte and written["bits_per_byte_reason"] is None
    firsts = {tuple(StoreReader(folder / "data" / "train").row(n).doc_lens) for n in range(num_rows)}
    assert any(len(lens) > 1 for lens in firsts), "documents share rows here"
    assert measured(folder, max_rows=3).bits_per_byte == pytest.approx(by_hand(folder, 3), rel=1e-5)


def test_bytes_of_all_labels_and_first_tokens_are_the_whole_text(folder: Path) -> None:
    from potstill.common.token_table import read_token_table

    reader, table = StoreReader(folder / "data" / "train"), read_token_table(folder / "data" / "tokenizer")
    firsts = 0
    for number in range(reader.num_rows):
        row, start = reader.row(number), 0
        for size in row.doc_lens.tolist():
            firsts += table.num_text_bytes(row.tokens[start : start + 1].tolist())
            start += size
    assert measured(folder).text.num_bytes == sum(len(text.encode()) for text in TEXTS * 4) - firsts


def test_without_the_tokenizer_of_the_rows_the_reason_is_told(folder: Path, tmp_path: Path, shared_data: Path) -> None:
    import shutil

    shutil.copytree(folder / "data" / "train", tmp_path / "alone")
    found = measured(folder, heldout=str(tmp_path / "alone"))
    assert found.bits_per_byte is None and found.to_json()["bits_per_byte"] is None
    assert "no tokenizer of the rows" in found.to_json()["bits_per_byte_reason"]
    assert "bits_per_byte  not known: no tokenizer" in found.format()
    named = measured(folder, heldout=str(tmp_path / "alone"), tokenizer=str(folder / "data" / "tokenizer"))
    assert named.bits_per_byte == measured(folder).bits_per_byte
    other = shared_data / "models" / "stories260K"
    with pytest.raises(UserError, match="were made with"):
        measured(folder, tokenizer=str(other))
    shutil.copytree(other, tmp_path / "tokenizer")
    assert "is another one" in str(measured(folder, heldout=str(tmp_path / "alone")).text.reason)


def test_other_tokenizers_count_what_they_write(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from potstill.common.token_table import tokenizer_digest
    from potstill.storage import TokensRow
    from potstill.student_train.evaluation.bits_per_byte import heldout_bytes

    vocab = {"[UNK]": 0, "play": 1, "##ing": 2, "café": 3}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    wrapped.save_pretrained(str(tmp_path / "tokenizer"))

    rows = [TokensRow(0, np.array([1, 2, 3, 3, 1], np.int32), np.array([3, 2], np.int32))]
    spec = tiny.spec_of("tokens", num_rows=None, vocab_size=4, tokenizer_digest=tokenizer_digest(wrapped))
    store = tiny.write_store(tmp_path / "rows", spec, rows)
    found = heldout_bytes(store, num_rows=1, asked=None, candidates=[None, tmp_path / "tokenizer"])
    assert found.num_bytes == len("ing café".encode()) + len(" play")
