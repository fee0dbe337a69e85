"""Evaluate a run, a checkpoint or any Hugging Face folder on held-out rows, in one process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from potstill.common.answer_text import decoder, end_ids_of
from potstill.common.disk_room import room_for
from potstill.common.errors import UserError
from potstill.storage import StoreError, StoreReader
from potstill.student_train.config.train import EvalConfig
from potstill.student_train.config.vocabulary import VocabularyConfig
from potstill.student_train.data.opening import check_belongs, open_store
from potstill.student_train.data.store_tokenizer import find_tokenizer_of, named_tokenizer, tokenizers_beside
from potstill.student_train.data.vocabulary import vocabulary_of
from potstill.student_train.evaluation.bits_per_byte import TextBytes, heldout_bytes
from potstill.student_train.evaluation.heldout import HeldoutEvaluation
from potstill.student_train.evaluation.written_answers import AnswerWriting, answer_writing
from potstill.student_train.hf_export.weights import EXPORT_FILE, Source, find_source, load_model, model_settings
from potstill.student_train.model.parameters import count_parameters
from potstill.student_train.model.student import StudentModel
from potstill.student_train.run.checkpoint import write_json_atomically
from potstill.student_train.run.run_folder import read_run_config


@dataclass(frozen=True)
class EvalSummary:
    """The figures of one model."""

    model: Path
    step: int | None
    num_parameters: int
    figures: dict[str, float | None]
    text: TextBytes

    @property
    def bits_per_byte(self) -> float | None:
        """Held-out loss in bits per byte of text; None where the bytes are not known (`text.reason`)."""
        loss, positions = self.figures["heldout_loss"], self.figures["positions"]
        assert loss is not None and positions is not None
        return self.text.bits_per_byte(loss=loss, positions=positions)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "model": str(self.model),
            "step": self.step,
            "num_parameters": self.num_parameters,
            **self.figures,
            "bits_per_byte": self.bits_per_byte,
            "text_bytes": self.text.num_bytes,
            "bits_per_byte_reason": self.text.reason,
        }

    def format(self) -> str:
        """A few lines for a person."""
        where = "" if self.step is None else f", step {self.step}"
        lines = [f"{self.model}{where}: {self.num_parameters:,} parameters"]
        lines += [f"  {name:14s} {value:.5g}" for name, value in self.figures.items() if value is not None]
        bits = self.bits_per_byte
        told = f"not known: {self.text.reason}" if bits is None else f"{bits:.5g}"
        lines.append(f"  {'bits_per_byte':14s} {told}")
        return "\n".join(lines)


def evaluate(config: EvalConfig) -> EvalSummary:
    """Measure; writes `config.output` (JSON) when given. Raises UserError."""
    if config.output is not None and config.output.exists() and not config.force:
        raise UserError(
            f"output {config.output} exists; name another file, or overwrite it with --force (force: true in a file)"
        )
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    tokens = open_store(config.heldout, "tokens", "heldout")
    targets = None
    if config.targets is not None:
        targets = open_store(config.targets, "targets", "targets")
        check_belongs(targets, tokens, key="targets", tokens_key="heldout")
    source, stored = find_source(config.model), tokens
    vocabulary = model_vocabulary(source, config.vocabulary)
    candidates = tokenizer_candidates(source, config.heldout, tokens)
    if vocabulary is not None:
        if config.answers.generate:
            raise UserError(
                "answers.generate: the model has a vocabulary of its own, in which potstill eval writes no answers; "
                "leave it out (answer_accuracy is their exact match), or set eval.answers in the training run"
            )
        tokens, targets = in_model_vocabulary(vocabulary, tokens, targets, candidates=candidates)
    writing = answers_of_folder(config, source, stored, candidates) if config.answers.generate else None
    hf = load_model(source, dtype=config.dtype)
    vocab_size = hf.config.get_text_config().vocab_size
    if vocab_size < tokens.vocab_size:
        raise UserError(
            f"{config.model} has vocab_size {vocab_size}, the held-out rows ids below {tokens.vocab_size}; they "
            "were not made with the same tokenizer"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = StudentModel(hf).to(device)
    evaluation = HeldoutEvaluation.create(
        tokens,
        targets,
        max_rows=config.max_rows,
        batch_rows=config.batch_rows,
        rank=0,
        world_size=1,
        device=device,
        writing=writing,
    )
    step = None if source.checkpoint is None else source.checkpoint.step
    # Before the forwards: a wrong tokenizer is an error, and a quick one. The text is the same under any ids.
    text = heldout_bytes(
        stored,
        num_rows=evaluation.num_rows,
        asked=config.tokenizer or (None if vocabulary is None else vocabulary.teacher_tokenizer),
        candidates=candidates,
    )
    summary = EvalSummary(config.model, step, count_parameters(student), evaluation.measure(student), text)
    if config.output is not None:
        with room_for(config.output):
            config.output.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomically(config.output, summary.to_json())
    return summary


def answers_of_folder(
    config: EvalConfig, source: Source, tokens: StoreReader, candidates: Sequence[Path | None]
) -> AnswerWriting:
    """How the answers of a model are written. Raises UserError, also where no tokenizer reads what is graded."""
    suffix = tokens.spec.info.get("suffix") or ()
    end_ids, decode = end_ids_of(suffix, None), None
    if config.answers.has_grader:
        wanted = tokens.spec.tokenizer_digest
        tokenizer, others = find_tokenizer_of(wanted, candidates)
        if config.tokenizer is not None:
            tokenizer = named_tokenizer(config.tokenizer, digest=wanted, store=tokens.url)
        if tokenizer is None:
            raise UserError(
                f"answers.grader reads texts, and no tokenizer of {tokens.url} lies beside the model or the store "
                f"({'; '.join(others) or 'none was found'}); name it with tokenizer"
            )
        end_ids, decode = end_ids_of(suffix, tokenizer, model_settings(source)), decoder(tokenizer)
    return answer_writing(config.answers, end_ids=end_ids, decode=decode, vocab_size=tokens.vocab_size)


def model_vocabulary(source: Source, asked: VocabularyConfig | None) -> VocabularyConfig | None:
    """The vocabulary of a model: as asked, else that of its run.

    Raises UserError for an export of a run that had one: rows in the ids of the stores would be other text to it.
    """
    if asked is not None or source.checkpoint is not None:
        return asked or read_run_config(source.run).data.vocabulary
    record = source.folder / EXPORT_FILE
    if record.is_file() and "vocabulary_map" in json.loads(record.read_text(encoding="utf-8")):
        raise UserError(
            f"{source.folder} was trained in a vocabulary of its own (data.vocabulary of its run), so that ids of "
            f"stores are other tokens to it; set vocabulary.tokenizer={source.folder}, and vocabulary.subset=true if "
            "its run said so (potstill eval), or name the run in place of the export"
        )
    return None


def in_model_vocabulary(
    vocabulary: VocabularyConfig,
    tokens: StoreReader,
    targets: StoreReader | None = None,
    *,
    candidates: Sequence[Path | None],
) -> tuple[StoreReader, StoreReader | None]:
    """Readers of the same rows in the model's ids. Raises UserError."""
    mapping = vocabulary_of(vocabulary, [tokens], candidates, key="vocabulary").mapping
    try:
        return tokens.with_vocabulary(mapping), None if targets is None else targets.with_vocabulary(mapping)
    except StoreError as error:
        raise UserError(f"vocabulary: {error}") from error


def tokenizer_candidates(source: Source, heldout: Path | str, tokens: StoreReader) -> list[Path | None]:
    """Where the tokenizer may lie: the model's own folder, the weights that a run started from, beside the store."""
    own = source.folder if source.checkpoint is None else read_run_config(source.run).model.path
    return [own, *tokenizers_beside(heldout, tokens.spec.info)]
