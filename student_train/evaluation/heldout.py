"""Held-out figures: loss, perplexity, accuracy, agreement with the teacher and KL to it.

The same measurement runs inside training (through the DeepSpeed engine, all ranks) and on any Hugging Face folder
(one process). Every rank runs the same number of forwards; short shares are filled with rows of weight 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from potstill.common.errors import UserError
from potstill.kernels.settings import LossSettings
from potstill.storage import LoadedBatch, StoreReader, TokensRow
from potstill.student_train.curriculum.step_objective import StepObjective
from potstill.student_train.data.batch import JoinedRow, MicroBatch, collate
from potstill.student_train.evaluation.calibration import NUM_BINS, expected_calibration_error
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
        return collate(
            batch,
            objective,
            micro_batch_rows=len(ids),
            row_length=self.tokens.spec.row_length,
            fixed_length=self.fixed_length,
        )[0]

    @torch.no_grad()
    def measure(self, model: RunsRequests) -> dict[str, float | None]:
        """Figures over all rows; `model` is a StudentModel or the engine around one (a collective call)."""
        from torch import distributed

        sampled = self.targets is not None and (self.targets.spec.selection or {}).get("mode") == "sample"
        objective = measuring_objective(with_targets=self.targets is not None, sampled=sampled)
        names = SparseLoss.sum_names
        total = torch.zeros(len(names) + 3 * NUM_BINS, dtype=torch.float64, device=self.device)
        was_training = bool(getattr(model, "training", False))
        model.eval()  # type: ignore[attr-defined]
        for rows, counted in self._batches():
            micro = self._micro_batch(rows, objective).to(self.device)
            if counted == 0:
                micro = replace(
                    micro, token_weights=torch.zeros(micro.labels.shape[0], device=self.device), num_active=0
                )
            total += torch.cat(model(HeldoutRequest(micro, objective)))
        model.train(was_training)  # type: ignore[attr-defined]
        if distributed.is_available() and distributed.is_initialized() and self.world_size > 1:
            distributed.all_reduce(total)
        values = total.tolist()
        figures = heldout_figures(dict(zip(names, values, strict=False)), self.num_rows)
        figures["calibration_error"] = expected_calibration_error(values[len(names) :])
        # The loss on draws is a cross-entropy, not a KL.
        return {**figures, "teacher_kl": None} if sampled else figures


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


def evaluation_line(figures: dict[str, float | None]) -> str:
    """Loss and perplexity of held-out rows for the console, and agreement and KL where a teacher was compared with."""
    parts = [f"held-out loss {figures['heldout_loss']:.4f}", f"perplexity {figures['perplexity']:.4g}"]
    if figures.get("agreement") is not None:
        parts.append(f"agreement {figures['agreement']:.3f}")
    if figures.get("teacher_kl") is not None:
        parts.append(f"KL to the teacher {figures['teacher_kl']:.4f}")
    return ", ".join(parts)
