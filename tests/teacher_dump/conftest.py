"""One tokenizer and one model for all tests of this room: making them is most of their time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.teacher_dump.tiny import make_tokens, save_llama, some_texts


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from potstill.teacher_dump.config import TrainTokenizer
    from potstill.teacher_dump.tokenizer import train_bpe

    folder = tmp_path_factory.mktemp("bpe") / "tokenizer"
    train_bpe(folder, some_texts(300), settings=TrainTokenizer(vocab_size=300), input_digest="test", force=False)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokens(tmp_path_factory.mktemp("tokens") / "store")
