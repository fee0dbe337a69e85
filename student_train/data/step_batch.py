"""What one rank trains on in one optimizer step, finished by the loader's threads while the step before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from potstill.storage import LoadedBatch
from potstill.student_train.curriculum.plan import CurriculumPlan, rows_digest
from potstill.student_train.curriculum.step_objective import StepObjective
from potstill.student_train.data.alignment import check_aligned
from potstill.student_train.data.batch import MicroBatch, collate, map_tensors
from potstill.student_train.data.unit_sums import UnitSums, total

if TYPE_CHECKING:
    from potstill.student_train.model.term import LossTerm


@dataclass(frozen=True)
class StepBatch:
    """A pure function of the batch number, the rank and the number of ranks.

    batch: number of the global batch, which is that of the step; micros: this rank's share on the CPU (page-locked if a
    GPU will take it); objective: the step's loss settings; weight_sum: sum of the token weights of `micros`;
    kd_weight_sum: that of weights of KD alone (MicroBatch), 0 where there are none or no micro-batch;
    unit_sums: of `micros`, where the mean of weights is taken over rows or documents, else None;
    rows_digest: names the rows of the whole global batch; source_counts [G, 2] float64: rows and tokens of each source
    in `micros`, None with one source.
    """

    batch: int
    micros: list[MicroBatch]
    objective: StepObjective
    weight_sum: float
    kd_weight_sum: float
    rows_digest: str
    source_counts: NDArray[np.float64] | None = None
    unit_sums: UnitSums | None = None

    @property
    def means_units(self) -> bool:
        """Whether the mean that divides weights is over rows or documents, also where this rank has none."""
        return self.objective.weights is not None and self.objective.weights.mean_over == "units"

    @property
    def weighs_kd(self) -> bool:
        """Whether rows or documents have weights of KD alone, which their mean over the global batch divides."""
        return self.objective.weights is not None and self.objective.weights.applies_to == "kd"


@dataclass(frozen=True)
class BatchFinisher:
    """Makes a StepBatch of loaded rows, in a thread of the loader (its `finish`)."""

    plan: CurriculumPlan
    micro_batch_rows: int
    row_length: int
    terms: Sequence[LossTerm]  # which may take columns of their own from the rows
    device: torch.device  # that will take the batches; for a GPU they are put into page-locked memory
    fixed_length: bool = False  # of the micro-batches, for a compiled backbone

    def __call__(self, loaded: LoadedBatch) -> StepBatch:
        # Of this thread only. Each thread that calls torch would otherwise bring a team of one thread per core with
        # it; torch's DataLoader does the same in its own threads.
        torch.set_num_threads(1)
        check_aligned(loaded)
        objective = self.plan.objective(loaded.batch)
        micros = collate(
            loaded,
            objective,
            terms=self.terms,
            micro_batch_rows=self.micro_batch_rows,
            row_length=self.row_length,
            fixed_length=self.fixed_length,
            live=self.plan.live,
        )
        if self.device.type == "cuda":
            # Of this thread as well: without it, every rank would open a context of its own on the first GPU.
            torch.cuda.set_device(self.device)
            micros = [map_tensors(micro, torch.Tensor.pin_memory) for micro in micros]
        return StepBatch(
            batch=loaded.batch,
            micros=micros,
            objective=objective,
            weight_sum=sum(micro.weight_sum for micro in micros),
            kd_weight_sum=sum(micro.kd_weight_sum or 0.0 for micro in micros),
            rows_digest=rows_digest(self.plan.rows(loaded.batch)),
            source_counts=source_counts(loaded, len(self.plan.source_names)),
            unit_sums=total(micro.unit_sums for micro in micros),
        )


def source_counts(loaded: LoadedBatch, num_sources: int) -> NDArray[np.float64] | None:
    """Rows and tokens of each source [G, 2] in these rows; None with one source."""
    if num_sources == 1:
        return None
    source = np.zeros(0, np.int64) if loaded.source is None else loaded.source
    lengths = [len(row.tokens) for row in loaded.tokens]
    counts = [np.bincount(source, weights, num_sources) for weights in (None, np.array(lengths, np.float64))]
    return np.stack(counts, 1).astype(np.float64)
