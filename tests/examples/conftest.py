"""Real stores of a tiny size, made by prepare, dump and score themselves, laid out as docs/python.md names them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from potstill.teacher_dump import DumpConfig, PrepareConfig, ScoreConfig, dump, prepare, score
from tests.teacher_dump.tiny import save_llama, some_texts, write_jsonl

VOCAB, ROW_LENGTH = 300, 48


@dataclass(frozen=True)
class Folder:
    """`root` holds data/train, data/heldout, data/tokenizer, targets, scores, models/teacher, configs/student."""

    root: Path
    tokens: Path
    targets: Path
    tokenizer: Path
    student: Path


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("python")
    write_jsonl(root / "corpus.jsonl", some_texts(160))
    prepare(
        PrepareConfig(
            input=[str(root / "corpus.jsonl")],
            output=root / "data",
            train_tokenizer={"vocab_size": VOCAB},
            row_length=ROW_LENGTH,
            rows_per_unit=4,
            heldout_fraction=0.2,
        )
    )
    save_llama(root / "models" / "teacher", vocab_size=VOCAB)
    save_llama(root / "configs" / "student", vocab_size=VOCAB, seed=1, sharpen=1.0)
    (root / "configs" / "student" / "model.safetensors").unlink()
    tokens, teacher = root / "data" / "train", {"model": root / "models" / "teacher", "check_tokenizer": False}
    dump(DumpConfig(tokens=tokens, output=root / "targets", teacher=teacher, selection={"mode": "top_k", "k": 8}))
    score(ScoreConfig(tokens=tokens, output=root / "scores", model=teacher))
    return Folder(root, tokens, root / "targets", root / "data" / "tokenizer", root / "configs" / "student")
