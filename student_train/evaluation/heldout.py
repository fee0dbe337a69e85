"""Held-out figures: loss, perplexity, accuracy, whole answers, agreement with the teacher and KL to it.

The same measurement runs inside training (through the DeepSpeed engine, all ranks) and on any Hugging Face folder
(one process). Every rank runs the same number of forwards; short shares are filled with rows of weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from potstill.common.errors import UserError
from potstill.kernels.settings import LossSettings
from potstill.storage import LoadedBatch, StoreReader, TokensRow
from potstill.student_train.curriculum.step_objective import StepObjective
from potstill.student_train.data.alignment import check_aligned
from potstill.student_train.data.batch import JoinedRow, MicroBatch, collate
from potstill.student_train.evaluation.answers import NUM_COUNTS, answer_figures
from potstill.student_train.evaluation.calibration import NUM_BINS, expected_calibration_error
from potstill.student_train.evaluation.written_answers import NUM_WRITTEN, AnswerWriting, answers_of, written_figures
from potstill.student_train.model.head import SparseLoss
from potstill.student_train.model.probe import HeldoutRequest
from potstill.student_train.model.requests import RunsRequests

TARGETS = "heldout_targets"


def measuring_objective(*, with_targets: bool, sampled: bool = False) -> StepObjective:
    """CE on all positions, and KL to the teacher (k+1 buckets, T = 1) when there are targets."""
    return StepObjective(
        targets=TARGETS if with_targets else None,
        settings=LossSettings(
            alpha=1.0 if with_targets else 0.0, ce_weight=1.0, divergence="sampled" if sampled else "forward_kl"
        ),
        tokens=None,
    )


@dataclass(frozen=True)
class HeldoutEvaluation:
    """Measures a model on held-out rows, divided over the ranks."""

    tokens: StoreReader
    targets: StoreReader | None
    num_rows: int
    batch_rows: int
    rank: int
    world_size: int
    device: torch.device
    fixed_length: bool = False  # of the micro-batches, for a compiled backbone
    writing: AnswerWriting | None = None  # have the answers written too, where the store has masks

    @classmethod
    def create(
        cls, tokens: StoreReader, targets: StoreReader | None, *, max_rows: int | None, **options: Any
    ) -> HeldoutEvaluation:
        """Use the first `max_rows` rows of the store. Raises UserError on an empty store."""
        num_rows = tokens.num_rows if max_rows is None else min(max_rows, tokens.num_rows)
        if num_rows == 0:
            raise UserError("the held-out store holds no rows; prepare a larger held-out split")
        return cls(tokens=tokens, targets=targets, num_rows=num_rows, **options)

    def _batches(self) -> list[tuple[np.ndarray, int]]:
        """This rank's (row ids, how many of them count) per forward; equally many on every rank."""
        stride = self.batch_rows * self.world_size
        found = []
        for first in range(0, self.num_rows, stride):
            start = first + self.rank * self.batch_rows
            rows = np.arange(start, min(start + self.batch_rows, self.num_rows))
            found.append((rows, len(rows)) if len(rows) else (np.zeros(1, np.int64), 0))
        return found

    def _micro_batch(self, rows: np.ndarray, objective: StepObjective) -> MicroBatch:
        ids = [int(row) for row in rows]
        joined = {} if self.targets is None else {TARGETS: cast("list[JoinedRow]", self.targets.rows(ids))}
        tokens = cast("list[TokensRow]", self.tokens.rows(ids))
        batch = LoadedBatch(batch=0, rows=rows.astype(np.int64), tokens=tokens, joined=joined)
        check_aligned(batch)
        return collate(
            batch,
            objective,
            micro_batch_rows=len(ids),
            row_length=self.tokens.spec.row_length,
            fixed_length=self.fixed_length,
        )[0]

    @property
    def is_sampled(self) -> bool:
        """Whether the targets are draws: the loss on draws is a cross-entropy, not a KL."""
        return self.targets is not None and (self.targets.spec.selection or {}).get("mode") == "sample"

    @property
    def has_kl(self) -> bool:
        """Whether the loss on the targets is a KL to the teacher.

        It is not on draws, nor on log-probabilities relative to the kept entries: what a teacher put on all others is
        not known of these.
        """
        return not self.is_sampled and (self.targets is None or self.targets.spec.normaliser != "kept")

    def measure(self, model: RunsRequests) -> dict[str, Any]:
        """Figures over all rows; `model` is a StudentModel or the engine around one (a collective call)."""
        return figures_of(self.totals(model), self.num_rows, has_kl=self.has_kl, graded=self.is_graded)

    @torch.no_grad()
    def totals(self, model: RunsRequests) -> list[float]:
        """Sums of the loss, the calibration bins, right and written answers over all rows, on every rank (collective).

        Where the store has no mask every token is trained on, and no part of a document is an answer: none is counted.
        """
        from torch import distributed

        objective = measuring_objective(with_targets=self.targets is not None, sampled=self.is_sampled)
        size = len(SparseLoss.sum_names) + 3 * NUM_BINS + NUM_COUNTS + NUM_WRITTEN
        total = torch.zeros(size, dtype=torch.float64, device=self.device)
        was_training = bool(getattr(model, "training", False))
        model.eval()  # type: ignore[attr-defined]
        for rows, counted in self._batches():
            micro = self._micro_batch(rows, objective).to(self.device)
            if counted == 0:
                micro = replace(
                    micro, token_weights=torch.zeros(micro.labels.shape[0], device=self.device), num_active=0
                )
            total[:-NUM_WRITTEN] += torch.cat(model(HeldoutRequest(micro, objective)))
        if self.tokens.spec.stores("mask"):
            total[-NUM_WRITTEN:] = torch.tensor(self._written(model), dtype=torch.float64)
        else:
            total[-NUM_COUNTS - NUM_WRITTEN :] = 0.0
        model.train(was_training)  # type: ignore[attr-defined]
        if distributed.is_available() and distributed.is_initialized() and self.world_size > 1:
            distributed.all_reduce(total)
        return list(total.tolist())

    @property
    def is_graded(self) -> bool:
        """Whether written answers get grades beside the exact match."""
        return self.writing is not None and self.writing.grade is not None

    def _written(self, model: RunsRequests) -> list[float]:
        """[NUM_WRITTEN], of this rank's share of the answers."""
        if self.writing is None:
            return [0.0] * NUM_WRITTEN
        num_rows = self.num_rows if self.writing.max_rows is None else min(self.num_rows, self.writing.max_rows)
        return self.writing.counts(
            model,
            answers_of(self.tokens.tokens_rows(range(num_rows))),
            row_length=self.tokens.spec.row_length,
            batch_rows=self.batch_rows,
            rank=self.rank,
            world_size=self.world_size,
            device=self.device,
        )


@dataclass(frozen=True)
class SourcesEvaluation:
    """Measures a model on held-out rows of sources: figures of each by name, and over all.

    whole: the rows that stand for all; None takes those of the parts together.
    """

    parts: Mapping[str, HeldoutEvaluation]
    whole: HeldoutEvaluation | None

    def measure(self, model: RunsRequests) -> dict[str, Any]:
        """Figures over all rows, and under `sources` those of each source (a collective call)."""
        totals = {name: part.totals(model) for name, part in self.parts.items()}
        found = {
            name: figures_of(totals[name], part.num_rows, has_kl=part.has_kl, graded=part.is_graded)
            for name, part in self.parts.items()
        }
        if self.whole is not None:
            return {**self.whole.measure(model), "sources": found}
        together = [sum(values) for values in zip(*totals.values(), strict=True)]
        num_rows = sum(part.num_rows for part in self.parts.values())
        has_kl = all(part.has_kl for part in self.parts.values())
        graded = any(part.is_graded for part in self.parts.values())
        return {**figures_of(together, num_rows, has_kl=has_kl, graded=graded), "sources": found}


def figures_of(values: list[float], num_rows: int, *, has_kl: bool, graded: bool) -> dict[str, float | None]:
    """Figures from the sums of `HeldoutEvaluation.totals`, which may be those of several stores added up."""
    names = SparseLoss.sum_names
    figures = heldout_figures(dict(zip(names, values, strict=False)), num_rows)
    bins, right, written = len(names), len(names) + 3 * NUM_BINS, len(values) - NUM_WRITTEN
    figures["calibration_error"] = expected_calibration_error(values[bins:right])
    figures |= answer_figures(values[right:written]) | written_figures(values[written:], graded=graded)
    return figures if has_kl else {**figures, "teacher_kl": None}


def heldout_figures(sums: dict[str, float], num_rows: int) -> dict[str, float | None]:
    """Means in nats per labelled position, and perplexity = exp(loss). Raises UserError where there is none."""
    if sums["label_weight"] <= 0:
        raise UserError(
            f"the {num_rows} held-out rows have no trained position: their masks leave nothing to measure; hold out "
            "other rows, or prepare them with a mask that is on somewhere"
        )
    loss = sums["ce"] / sums["label_weight"]
    has_targets = sums["target_weight"] > 0
    return {
        "heldout_loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "accuracy": sums["correct"] / sums["label_weight"],
        "entropy": sums["entropy"] / sums["weight"],
        "agreement": sums["agreement"] / sums["target_weight"] if has_targets else None,
        "teacher_kl": sums["kd"] / sums["kd_weight"] if has_targets and sums["kd_weight"] > 0 else None,
        "positions": sums["label_weight"],
        "rows": float(num_rows),
    }


def evaluation_line(figures: Mapping[str, Any]) -> str:
    """Loss and perplexity of held-out rows for the console; right answers, agreement and KL where there are any.

    The loss of each source behind them, where sources have held-out rows of their own.
    """
    parts = [f"held-out loss {figures['heldout_loss']:.4f}", f"perplexity {figures['perplexity']:.4g}"]
    if "answer_accuracy" in figures:
        parts.append(f"answers right {figures['answer_accuracy']:.3f}")
    if "answer_pass_rate" in figures:
        parts.append(f"passed {figures['answer_pass_rate']:.3f}")
    if figures.get("agreement") is not None:
        parts.append(f"agreement {figures['agreement']:.3f}")
    if figures.get("teacher_kl") is not None:
        parts.append(f"KL to the teacher {figures['teacher_kl']:.4f}")
    if "sources" in figures:
        parts += [f"{name} {own['heldout_loss']:.4f}" for name, own in figures["sources"].items()]
    return ", ".join(parts)
