"""Evaluate a run, a checkpoint or any Hugging Face folder on held-out rows, in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from potstill.common.errors import UserError
from potstill.student_train.checkpoint import write_json_atomically
from potstill.student_train.config import EvalConfig
from potstill.student_train.evaluation import HeldoutEvaluation
from potstill.student_train.model import StudentModel, count_parameters
from potstill.student_train.stores import check_joined, open_store
from potstill.student_train.weights import find_source, load_model


@dataclass(frozen=True)
class EvalSummary:
    """The figures of one model."""

    model: Path
    step: int | None
    num_parameters: int
    figures: dict[str, float | None]

    def format(self) -> str:
        """A few lines for a person."""
        where = "" if self.step is None else f", step {self.step}"
        lines = [f"{self.model}{where}: {self.num_parameters:,} parameters"]
        lines += [f"  {name:14s} {value:.5g}" for name, value in self.figures.items() if value is not None]
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
        check_joined(targets, tokens, key="targets", tokens_key="heldout")
    source = find_source(config.model)
    hf = load_model(source, dtype=config.dtype)
    vocab_size = hf.config.get_text_config().vocab_size
    if vocab_size < tokens.spec.vocab_size:
        raise UserError(
            f"{config.model} has vocab_size {vocab_size}, the held-out store ids below {tokens.spec.vocab_size}; they "
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
    )
    step = None if source.checkpoint is None else source.checkpoint.step
    summary = EvalSummary(config.model, step, count_parameters(student), evaluation.measure(student))
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        record = {"model": str(config.model), "step": step, "num_parameters": summary.num_parameters}
        write_json_atomically(config.output, {**record, **summary.figures})
    return summary
