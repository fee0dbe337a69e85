"""The curriculum as a pure plan: which rows, which stores and which loss settings global batch b has.

Built once from the configuration and the indexes of the stores; after that everything is a function of the batch
number (= the optimizer step), so any rank, world size and resume sees the same thing.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.common.errors import UserError
from potstill.storage import MIXTURE_VERSION
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.curriculum.clock import StageClock
from potstill.student_train.curriculum.live_scores import LiveScores
from potstill.student_train.curriculum.schedules import share_of_span
from potstill.student_train.curriculum.segments import (
    PlanSource,
    Segment,
    StageSpan,
    check_warmup,
    plan_segments,
    segments_digest,
    stage_spans,
)
from potstill.student_train.curriculum.step_objective import StepObjective, step_objective

PLAN_VERSION = 1


def total_steps(config: TrainConfig, *, row_length: int) -> int:
    """Optimizer steps of the run; `run.max_tokens` is rounded up to whole global batches of full rows."""
    if config.run.max_steps is not None:
        return config.run.max_steps
    assert config.run.max_tokens is not None
    return -(-config.run.max_tokens // (config.data.global_batch_rows * row_length))


class CurriculumPlan:
    """Rows, joined stores and loss settings of every global batch; implements the loader's `RowPlan`.

    Row ids are those of the sources one after the other. A stage without a row selector draws each source's rows on the
    main stream from where the stages before it would have left it, so two runs of the same seed see the same rows
    wherever neither selects. A stage with one is cut into equal segments; each draws from its own pools on its own
    stream, starting at position 0. With several sources the stage's mix says which one a position draws from.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        total_steps: int,
        sources: Sequence[PlanSource],
        term_stores: frozenset[str] = frozenset(),
        clocks: Mapping[int, StageClock] | None = None,
    ) -> None:
        """`sources`: in the order of the configuration; `term_stores`: what loss terms read at every step.

        `clocks`: by number of the stage, of those that learn from several stores one after another.
        """
        self.global_batch = config.data.global_batch_rows
        self.total_steps = total_steps
        self.source_names = tuple(source.name for source in sources)
        self._config = config
        self._term_stores = term_stores
        self.clocks = dict(clocks or {})
        self.num_rows = sum(source.num_rows for source in sources)
        if self.num_rows < self.global_batch:
            place = "data.tokens holds" if len(sources) == 1 else "data.sources hold"
            raise UserError(
                f"{place} {self.num_rows} rows, fewer than one global batch of {self.global_batch} "
                "(data.global_batch_rows); take a smaller batch or more text"
            )
        self.spans = stage_spans(config, total_steps)
        check_warmup(config, self.spans)
        self.segments = plan_segments(config, self.spans, sources)
        for segment in self.segments:
            for ties in segment.ties:
                raise UserError(ties)
        self._digest: tuple[tuple[Segment, ...], str] | None = None
        self._sources = tuple(sources)
        self._starts = [segment.first_batch for segment in self.segments]
        self.live: LiveScores | None = None  # what the run has scored itself; None before the first time

    def with_scores(self, scores: LiveScores) -> CurriculumPlan:
        """This plan behind a rescoring: weights are by these scores, and rows are ranked by them. Raises UserError.

        Segments before the step at which they were made are then not those that were trained on. Rows that the scores
        cannot tell apart are decided by row id: `segment(batch).ties` says whether there are too many of them.
        """
        plan = copy(self)
        plan.live = scores
        rescoring = self._config.rescoring
        if rescoring is not None and any(rescoring.ranks(span.stage) for span in self.spans):
            sources, first = [], 0
            for source in self._sources:
                found = scores.statistics_of(first, source.num_rows)
                sources.append(replace(source, stats={**source.stats, scores.name: found}))
                first += source.num_rows
            plan._sources = tuple(sources)
            plan.segments = plan_segments(self._config, self.spans, sources)
        return plan

    def weighs_by_scores(self, batch: int) -> bool:
        """Whether rows or documents of batch `batch` count by the scores that the run has made itself."""
        weights = self.objective(batch).weights
        return weights is not None and weights.store == self.scored_name

    @property
    def scored_name(self) -> str | None:
        """Name of the scores that the run makes itself; None where it makes none."""
        return None if self._config.rescoring is None else self._config.rescoring.name

    def segment(self, batch: int) -> Segment:
        """The segment that global batch `batch` lies in."""
        return self.segments[bisect_right(self._starts, batch) - 1]

    def rows(self, batch: int) -> NDArray[np.int64]:
        """Row ids [global_batch] of global batch `batch`."""
        return self.rows_of(batch, batch + 1)

    def rows_of(self, first: int, end: int) -> NDArray[np.int64]:
        """Row ids of the global batches [first, end), one after another; they must be of one segment."""
        segment = self.segment(first)
        start, stop = ((batch - segment.first_batch) * self.global_batch for batch in (first, end))
        return segment.order.rows(np.arange(start, stop, dtype=np.int64))

    def source_bounds(self, number: int) -> tuple[int, int]:
        """Global ids of the first row of source `number`, and of the first behind it."""
        before = sum(source.num_rows for source in self._sources[:number])
        return before, before + self._sources[number].num_rows

    def row_share(self, batch: int) -> float:
        """Share of the rows of its stage's sources that batch `batch` is drawn from; 1 where no selector works."""
        segment = self.segment(batch)
        return segment.pool_size / sum(self._sources[number].num_rows for number in segment.order.used())

    def rows_taken(self, first_step: int, end_step: int) -> tuple[int, ...]:
        """How many rows of each source the steps [first_step, end_step) draw."""
        ends = [*self._starts[1:], max(self.total_steps, end_step)]
        taken = np.zeros(len(self._sources), np.int64)
        for segment, end in zip(self.segments, ends, strict=True):
            low, high = (min(max(step, segment.first_batch), end) for step in (first_step, end_step))
            places = [(step - segment.first_batch) * self.global_batch for step in (low, high)]
            before, after = (segment.order.mixture.counts(place) for place in places)
            taken += after - before
        return tuple(taken.tolist())

    def mix(self, batch: int) -> dict[str, float]:
        """Share of the rows by name of the source, of those that batch `batch` draws from."""
        weights = self.segment(batch).order.mixture.weights
        return {name: weight / sum(weights) for name, weight in zip(self.source_names, weights, strict=True) if weight}

    def objective(self, step: int) -> StepObjective:
        """Loss settings of optimizer step `step`."""
        span = self.segment(step).span
        x = share_of_span(step, span.first_step, span.end_step)
        return step_objective(self._config.objective, span.stage, x, targets=self.targets(step))

    def targets(self, step: int) -> str | None:
        """The store that optimizer step `step` learns from; None in a stage on labels alone."""
        span = self.segment(step).span
        clock = self.clocks.get(span.index)
        return span.stage.targets if clock is None else clock.store(step - span.first_step)

    def clock_parts(self, span: StageSpan) -> tuple[tuple[int, str, int], ...]:
        """First step, store and teacher step of each part of a stage with a clock, as far as decided; else none."""
        if span.index not in self.clocks:
            return ()
        parts = self.clocks[span.index].parts(span.end_step - span.first_step)
        return tuple((span.first_step + first, store, teacher_step) for first, store, teacher_step in parts)

    def with_clocks(self, clocks: Mapping[int, StageClock]) -> CurriculumPlan:
        """The same plan with these clocks in the place of its own, by number of the stage."""
        found = copy(self)
        found.clocks = {**self.clocks, **clocks}
        return found

    def lr_factor(self, step: int) -> float:
        """Factor on the peak learning rate at optimizer step `step`."""
        span = self.segment(step).span
        return self._config.schedule.factor_at(
            step, total_steps=self.total_steps, first_step=span.first_step, end_step=span.end_step
        )

    def restarts_optimizer(self, step: int) -> bool:
        """Whether the optimizer starts anew before step `step`: the first of a stage that asks for it."""
        span = self.segment(step).span
        return span.stage.restart_optimizer and step == span.first_step and step > 0

    def joined(self, batch: int) -> frozenset[str]:
        """Exactly the stores that this batch's loss reads; none but those of terms where nothing distils or selects.

        Scores that the run makes itself are no store: `live` holds them.
        """
        return (self.objective(batch).stores | self._term_stores) - {self.scored_name}

    def may_join(self, batch: int) -> frozenset[str]:
        """Every store that this batch's loss may come to read, where that is decided while the run trains."""
        clock = self.clocks.get(self.segment(batch).span.index)
        if clock is None or not clock.is_decided or self.objective(batch).targets is None:
            return self.joined(batch)
        return self.joined(batch) | set(clock.stores)

    def decisions(self) -> frozenset[str]:
        """Names of what must be decided while the run trains (run/deciders.py has who does)."""
        of_clocks = {"targets_clock"} if any(clock.is_decided for clock in self.clocks.values()) else set()
        return frozenset(of_clocks | ({"rescoring"} if self._config.rescoring is not None else set()))

    def rows_are_decided(self, batch: int) -> bool:
        """Whether the rows of this batch are known before the run; not where it ranks them by scores of its own."""
        rescoring = self._config.rescoring
        return rescoring is None or not rescoring.ranks(self.segment(batch).span.stage)

    def position(self, batch: int) -> dict[str, int]:
        """Where batch `batch` stands, for people and for the saved state."""
        consumed = batch * self.global_batch
        return {"epoch": consumed // self.num_rows, "stage": self.segment(batch).span.index, "rows_consumed": consumed}

    def identity(self) -> dict[str, Any]:
        """What pins the order of rows. The end of the last stage is left out: a run may be made longer."""
        data = self._config.data
        found = {
            "kind": "curriculum",
            "version": PLAN_VERSION,
            "num_rows": self.num_rows,
            "global_batch": self.global_batch,
            "seed": self._config.run.seed,
            "mode": data.order,
            "segments": self._segments_digest(),
        }
        if len(self._sources) == 1:
            return found
        rows = [[source.name, source.num_rows] for source in self._sources]  # their order is that of row ids
        return {**found, "mixture_version": MIXTURE_VERSION, "sources": rows}

    def _segments_digest(self) -> str:
        """Worked out once: over pools of millions of rows it takes a second."""
        if self._digest is None or self._digest[0] is not self.segments:
            self._digest = (self.segments, segments_digest(self.segments, rescoring=self._config.rescoring))
        return self._digest[1]


def describe(plan: CurriculumPlan) -> list[Mapping[str, Any]]:
    """One readable record per segment, for the run folder."""
    return [
        {
            "stage": segment.span.name,
            "first_step": segment.first_batch,
            "rows": segment.pool_size,
            "targets": segment.span.stage.targets,
            **({"targets_clock": plan.clock_parts(segment.span)} if segment.span.index in plan.clocks else {}),
            **({} if len(plan.source_names) == 1 else {"mix": plan.mix(segment.first_batch)}),
            **({"restarts_optimizer": True} if plan.restarts_optimizer(segment.first_batch) else {}),
        }
        for segment in plan.segments
    ]


def rows_digest(rows: NDArray[np.int64]) -> str:
    """Short digest of a global batch's row ids, for comparing the order of two runs."""
    return hashlib.sha256(json.dumps([int(row) for row in rows]).encode()).hexdigest()[:16]
