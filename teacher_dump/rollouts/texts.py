"""What answers are graded on: their text, or their ids where there is no text; and which ids end one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.common.answer_text import Decode, end_ids_of, first_end
from potstill.common.errors import UserError
from potstill.common.grading import Grader
from potstill.common.model_place import one_line
from potstill.storage import StoreReader
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.rollouts.config import RolloutConfig
from potstill.teacher_dump.rollouts.questions import Question
from potstill.teacher_dump.tokenizer import load_tokenizer, tokenizer_digest

log = logging.getLogger(__name__)
Ids = NDArray[np.int32]


def as_numbers(ids: Sequence[int]) -> str:
    """Ids as words between spaces."""
    return " ".join(map(str, ids))


@dataclass(frozen=True)
class Judge:
    """Grades answers, one at a time: functions of users need not bear several threads."""

    decode: Decode
    grader: Grader
    stop_ids: frozenset[int]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def grade(self, question: Question, answer: Ids) -> float:
        """Grade in [0, 1] of an answer, both it and its reference up to where they end. Raises UserError."""
        mine = answer.tolist()
        mine = mine[: first_end(mine, self.stop_ids)]
        wanted = question.reference[: question.ends].tolist()
        with self.lock:
            return self.grader(self.decode(mine), self.decode(wanted))


def find_tokenizer(config: RolloutConfig, reader: StoreReader) -> tuple[str, Any] | None:
    """Where the tokenizer of the rows is, and it; None with `grade_ids`. Raises UserError where none is found."""
    if config.grade_ids:
        return None
    digest = reader.spec.tokenizer_digest
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
        if tokenizer_digest(tokenizer) != digest:
            raise UserError(
                f"tokenizer {config.tokenizer} is not that of {config.tokens} (digest "
                f"{tokenizer_digest(tokenizer)[:16]}, expected {digest[:16]}); name the one that prepare used"
            )
        return config.tokenizer, tokenizer
    for folder in _candidates(config, reader):
        if not folder.is_dir() or not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            continue
        try:
            tokenizer = load_tokenizer(str(folder))
        except UserError as error:
            log.info("tokenizer %s is passed over: %s", folder, one_line(error))
            continue
        if tokenizer_digest(tokenizer) == digest:
            return str(folder), tokenizer
    raise UserError(
        f"the tokenizer of {config.tokens} is neither beside it nor with the model, so that answers have no text; name "
        "its folder (--tokenizer), or grade ids (grade_ids: true)"
    )


def _candidates(config: RolloutConfig, reader: StoreReader) -> list[Path]:
    named = reader.spec.info.get("tokenizer")
    found = [Path(named)] if isinstance(named, str) else []
    if "://" not in config.tokens:
        found += [Path(config.tokens) / "tokenizer", Path(config.tokens).parent / "tokenizer"]
    return [*found, Path(config.model.model)]


def find_stop_ids(config: RolloutConfig, reader: StoreReader, tokenizer: Any | None, model: Any) -> frozenset[int]:
    """Ids that end an answer: as asked, else by the rule of common/answer_text.py.

    `model` is the configuration of transformers. Raises UserError for ids that there are not.
    """
    if config.stop_ids is not None:
        beyond = [one for one in config.stop_ids if one >= reader.spec.vocab_size]
        if beyond:
            raise UserError(
                f"stop_ids has {beyond[0]}, the ids of {config.tokens} are below {reader.spec.vocab_size}, so that it "
                "never ends an answer; name ids of its tokenizer"
            )
        return frozenset(config.stop_ids)
    settings = [model.get_text_config(), _generation(config.model)]
    return end_ids_of(reader.spec.info.get("suffix") or (), tokenizer, settings)


def _generation(teacher: TeacherConfig) -> Any | None:
    """The model's generation_config.json, where a folder has one."""
    from transformers import GenerationConfig

    if not (Path(teacher.model) / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(teacher.model, local_files_only=True)
