"""Real text as rows and real teachers, loaded once: starting vLLM is most of the time of these tests.

Without vLLM the modules here skip themselves; `make test-vllm` makes an environment that has it.
"""

from __future__ import annotations

import gc
import itertools
import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from potstill.storage import TokensRow
from tests.teacher_dump.tiny import token_rows, write_jsonl


@dataclass(frozen=True)
class RealText:
    """A teacher, and tokens stores of its tokenizer: several documents in a row, and rows with masks."""

    teacher: Path
    plain: Path
    masked: Path

    @property
    def rows(self) -> list[TokensRow]:
        return [*token_rows(self.plain), *token_rows(self.masked)]


@pytest.fixture(scope="session")
def real_text(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RealText:
    from potstill.teacher_dump import PrepareConfig, prepare

    teacher, folder = shared_data / "models" / "teacher-7m", tmp_path_factory.mktemp("real")
    with lzma.open(shared_data / "tinystories" / "valid.jsonl.xz", "rt") as stream:
        texts = [json.loads(line)["text"] for line in itertools.islice(stream, 48)]
    with lzma.open(shared_data / "novels" / "valid.jsonl.xz", "rt") as stream:
        texts += [json.loads(line)["text"][:9000] for line in itertools.islice(stream, 2)]
    common = {"tokenizer": teacher, "row_length": 512, "rows_per_unit": 4}
    prepare(PrepareConfig(input=[write_jsonl(folder / "texts.jsonl", texts)], output=folder / "plain", **common))
    with lzma.open(shared_data / "math-gsm8k" / "valid.jsonl.xz", "rt") as stream:
        pairs = [json.loads(line)["text"].split("\nAnswer:") for line in itertools.islice(stream, 24)]
    lines = [json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in pairs]
    (folder / "pairs.jsonl").write_text("".join(lines))
    fields = {"prompt_field": "question", "response_field": "answer", "packing": "whole"}
    prepare(PrepareConfig(input=[folder / "pairs.jsonl"], output=folder / "masked", **common, **fields))
    return RealText(teacher, folder / "plain" / "train", folder / "masked" / "train")


@pytest.fixture
def loaded() -> Iterator[Callable[..., Any]]:
    """Loads engines by TeacherConfig, and lets go of them at the end of a test: two at once share little memory."""
    from potstill.teacher_dump.config import TeacherConfig
    from potstill.teacher_dump.engines.loading import load_engine

    held: list[Any] = []

    def load(*, row_length: int | None = None, **settings: Any) -> Any:
        held.append(load_engine(TeacherConfig(**settings), row_length=row_length))
        return held[-1]

    yield load
    held.clear()
    gc.collect()
