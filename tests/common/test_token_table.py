"""Bytes of tokens: against the tokenizers themselves, on texts whose characters are cut over tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from potstill.common.errors import UserError
from potstill.common.token_table import TokenTable, read_token_table, token_table

TEXT = "A naïve café costs 5€: 日本語 👩‍🚀\n\t“quoted” </script>\x00 end"


def byte_level(folder: Path) -> Path:
    """A byte-level BPE of the 256 bytes alone, so that every character beyond ASCII is cut."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0} | {sign: n + 1 for n, sign in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_bytes_of_a_byte_level_tokenizer_are_the_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = byte_level(tmp_path / "t")
    table = read_token_table(folder)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    assert table.kind == "byte_level"
    assert len(ids) == len(TEXT.encode())
    assert b"".join(table.piece(token) for token in ids) == TEXT.encode()
    assert table.num_text_bytes([*ids, 0]) == len(TEXT.encode()), "a special token stands for no text"
    assert table.piece(0) == b"<|endoftext|>" and table.piece(10_000) == b"<10000>"


def test_bytes_of_a_trained_tokenizer_are_the_text(shared_data: Path) -> None:
    from tokenizers import Tokenizer

    folder = shared_data / "models" / "teacher-7m"
    table = read_token_table(folder)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    assert b"".join(table.piece(token) for token in ids) == TEXT.encode()


def test_bytes_of_sentencepiece(shared_data: Path) -> None:
    from tokenizers import Tokenizer

    folder = shared_data / "models" / "stories260K"
    table = read_token_table(folder)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    assert table.kind == "sentencepiece"
    assert b"".join(table.piece(token) for token in ids).removeprefix(b" ") == TEXT.encode()


def test_other_tokenizers_keep_what_is_written() -> None:
    words = {"type": "WordPiece", "vocab": {"play": 3, "##ing": 4}}
    table = token_table(json.dumps({"model": words, "decoder": {"type": "WordPiece"}, "added_tokens": []}))
    assert isinstance(table, TokenTable) and table.kind == "other"
    assert table.piece(4) == b"##ing"
    unigram = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["\u2581a", -1.0]]}
    assert token_table(json.dumps({"model": unigram, "decoder": {"type": "Metaspace"}})).piece(1) == b" a"


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer in"):
        read_token_table(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
        read_token_table(tmp_path)
