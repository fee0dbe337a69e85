"""The curriculum as a pure plan: which rows, which stores and which loss settings global batch b has.

Built once from the configuration and the indexes of the stores; after that everything is a function of the batch
number (= the optimizer step), so any rank, world size and resume sees the same thing.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.common.errors import UserError
from potstill.storage import RowOrder
from potstill.student_train.config.lr_schedule import span_steps
from potstill.student_train.config.stages import Stage
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.curriculum.row_selector import RowStats, pool, ranked_rows, row_scores
from potstill.student_train.curriculum.schedules import scalar_value, share_of_span
from potstill.student_train.curriculum.step_objective import StepObjective, step_objective

PLAN_VERSION = 1


@dataclass(frozen=True)
class StageSpan:
    """Stage `index` covers the steps [first_step, end_step); the last one has no end."""

    index: int
    stage: Stage
    first_step: int
    end_step: int
    name: str


@dataclass(frozen=True)
class Segment:
    """Batches from `first_batch` on draw from `pool` (row ids ascending; None: every row, on the run's main stream)."""

    first_batch: int
    span: StageSpan
    pool: NDArray[np.int64] | None
    stream: int


def stage_spans(config: TrainConfig, total_steps: int) -> tuple[StageSpan, ...]:
    """Cut [0, total_steps) at the stages' ends. Raises UserError when a stage is left without a step."""
    spans: list[StageSpan] = []
    first = 0
    for index, stage in enumerate(config.curriculum):
        end = total_steps if stage.until is None else span_steps(stage.until, total_steps)
        if end <= first:
            raise UserError(
                f"curriculum.{index}.until = {stage.until!r} ends at step {end}, but the stage starts at step {first} "
                f"of {total_steps}; stages must rise and hold at least one step (more run.max_steps, or another until)"
            )
        if end > total_steps:
            raise UserError(
                f"curriculum.{index}.until = {end} lies after the last step {total_steps} of the run; lower it, give a "
                "share of the run (0.5), or raise run.max_steps"
            )
        spans.append(StageSpan(index, stage, first, end, stage.name or f"stage_{index}"))
        first = end
    return tuple(spans)


def check_warmup(config: TrainConfig, spans: tuple[StageSpan, ...]) -> None:
    """Refuse a warm-up that no stage would come to the end of, where each has its own. Raises UserError."""
    warmup = config.schedule.warmup
    for span in spans if config.schedule.span == "stages" else ():
        steps = span.end_step - span.first_step
        if span_steps(warmup, steps) > steps:
            raise UserError(
                f"schedule.warmup is {warmup} steps, but stage curriculum.{span.index} holds {steps}, and with "
                "schedule.span stages each stage warms up by itself; take a shorter warm-up, a share of the stage "
                "(a float), longer stages, or span run"
            )


def total_steps(config: TrainConfig, *, row_length: int) -> int:
    """Optimizer steps of the run; `run.max_tokens` is rounded up to whole global batches of full rows."""
    if config.run.max_steps is not None:
        return config.run.max_steps
    assert config.run.max_tokens is not None
    return -(-config.run.max_tokens // (config.data.global_batch_rows * row_length))


class CurriculumPlan:
    """Rows, joined stores and loss settings of every global batch; implements the loader's `RowPlan`.

    A stage without a row selector takes its rows from the main stream at the absolute position b * global_batch, so
    two runs of the same seed see the same rows wherever neither selects. A stage with one is cut into equal
    segments; each draws from its own pool on its own stream, starting at position 0.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        total_steps: int,
        num_rows: int,
        stats: RowStats,
        term_stores: frozenset[str] = frozenset(),
    ) -> None:
        """`stats`: figures that row selectors need; `term_stores`: what loss terms read at every step."""
        self.global_batch = config.data.global_batch_rows
        self.total_steps = total_steps
        self._config = config
        self._term_stores = term_stores
        self._num_rows = num_rows
        if num_rows < self.global_batch:
            raise UserError(
                f"data.tokens holds {num_rows} rows, fewer than one global batch of {self.global_batch} "
                "(data.global_batch_rows); take a smaller batch or more text"
            )
        self.spans = stage_spans(config, total_steps)
        check_warmup(config, self.spans)
        self.segments = tuple(segment for span in self.spans for segment in self._segments(span, stats))
        self._starts = [segment.first_batch for segment in self.segments]
        self._orders = {segment.stream: self._order(segment) for segment in self.segments}

    def _segments(self, span: StageSpan, stats: RowStats) -> list[Segment]:
        selector = span.stage.rows
        if selector is None:
            return [Segment(span.first_step, span, None, 0)]
        key = f"curriculum.{span.index}.rows"
        scores = row_scores(selector.score, stats, num_rows=self._num_rows, seed=self._config.run.seed, key=key)
        ranked = ranked_rows(scores, selector.keep)
        steps = span.end_step - span.first_step
        count = min(selector.segments, steps)
        found: list[Segment] = []
        for number in range(count):
            x = number / max(count - 1, 1)
            rows = pool(ranked, share=scalar_value(selector.share, x), skip=scalar_value(selector.skip, x))
            if rows is not None and len(rows) < self.global_batch:
                raise UserError(
                    f"{key}: part {number} of the stage keeps {len(rows)} of {self._num_rows} rows, fewer than a "
                    f"global batch of {self.global_batch}; raise share or lower data.global_batch_rows"
                )
            stream = 0 if rows is None else 1 + span.index * 1000 + number
            found.append(Segment(span.first_step + number * steps // count, span, rows, stream))
        return found

    def _order(self, segment: Segment) -> RowOrder:
        size = self._num_rows if segment.pool is None else len(segment.pool)
        data = self._config.data
        return RowOrder(size, seed=self._config.run.seed, mode=data.order, stream=segment.stream)

    def segment(self, batch: int) -> Segment:
        """The segment that global batch `batch` lies in."""
        return self.segments[bisect_right(self._starts, batch) - 1]

    def rows(self, batch: int) -> NDArray[np.int64]:
        """Row ids [global_batch] of global batch `batch`."""
        segment = self.segment(batch)
        start = (batch - (0 if segment.pool is None else segment.first_batch)) * self.global_batch
        positions = np.arange(start, start + self.global_batch, dtype=np.int64)
        order = self._orders[segment.stream]
        size = self._num_rows if segment.pool is None else len(segment.pool)
        epochs = positions // size
        chosen = np.concatenate(
            [order.rows(int(epoch), positions[epochs == epoch] % size) for epoch in np.unique(epochs)]
        )
        return chosen if segment.pool is None else segment.pool[chosen]

    def row_share(self, batch: int) -> float:
        """Share of all rows that batch `batch` is drawn from; 1 where no selector works."""
        chosen = self.segment(batch).pool
        return 1.0 if chosen is None else len(chosen) / self._num_rows

    def objective(self, step: int) -> StepObjective:
        """Loss settings of optimizer step `step`."""
        span = self.segment(step).span
        x = share_of_span(step, span.first_step, span.end_step)
        return step_objective(self._config.objective, span.stage, x)

    def lr_factor(self, step: int) -> float:
        """Factor on the peak learning rate at optimizer step `step`."""
        span = self.segment(step).span
        return self._config.schedule.factor_at(
            step, total_steps=self.total_steps, first_step=span.first_step, end_step=span.end_step
        )

    def joined(self, batch: int) -> frozenset[str]:
        """Exactly the stores that this batch's loss reads; none but those of terms where nothing distils or selects."""
        return self.objective(batch).stores | self._term_stores

    def position(self, batch: int) -> dict[str, int]:
        """Where batch `batch` stands, for people and for the saved state."""
        consumed = batch * self.global_batch
        return {"epoch": consumed // self._num_rows, "stage": self.segment(batch).span.index, "rows_consumed": consumed}

    def identity(self) -> dict[str, Any]:
        """What pins the order of rows. The end of the last stage is left out: a run may be made longer."""
        digest = hashlib.sha256()
        for segment in self.segments:
            rows = b"all" if segment.pool is None else segment.pool.astype("<i8").tobytes()
            digest.update(f"{segment.first_batch} {segment.stream} {len(rows)} ".encode() + rows)
        data = self._config.data
        return {
            "kind": "curriculum",
            "version": PLAN_VERSION,
            "num_rows": self._num_rows,
            "global_batch": self.global_batch,
            "seed": self._config.run.seed,
            "mode": data.order,
            "segments": digest.hexdigest(),
        }


def describe(plan: CurriculumPlan) -> list[Mapping[str, Any]]:
    """One readable record per segment, for the run folder."""
    return [
        {
            "stage": segment.span.name,
            "first_step": segment.first_batch,
            "rows": plan.identity()["num_rows"] if segment.pool is None else len(segment.pool),
            "targets": segment.span.stage.targets,
        }
        for segment in plan.segments
    ]


def rows_digest(rows: NDArray[np.int64]) -> str:
    """Short digest of a global batch's row ids, for comparing the order of two runs."""
    return hashlib.sha256(json.dumps([int(row) for row in rows]).encode()).hexdigest()[:16]
