"""Stages of a run cut into segments, in each of which every source's rows come from one pool in one order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from potstill.common.errors import UserError
from potstill.storage import Draw, MixedOrder, Mixture, RowOrder, source_seed, whole_weights
from potstill.student_train.config.lr_schedule import span_steps
from potstill.student_train.config.rescoring import Rescoring
from potstill.student_train.config.stages import Stage
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.curriculum.row_pools import PlanSource, Pool, source_pools
from potstill.student_train.curriculum.schedules import scalar_value

_HASHED_AT_ONCE = 1 << 20  # rows


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
    """Batches from `first_batch` on draw their rows by `order`, the first of them from its position 0 on.

    stream: of the orders; 0 where no row selector works, which is the run's main stream. ties: what is wrong with a
    score that cannot tell apart rows at a cut of its pools, so that row ids decide there.
    """

    first_batch: int
    span: StageSpan
    order: MixedOrder
    stream: int
    ties: tuple[str, ...] = ()

    @property
    def pool_size(self) -> int:
        """Rows that may be drawn."""
        return sum(draw.order.num_rows for draw in self.order.used().values())

    def has_in_pool(self, row: int) -> bool:
        """Whether the row of this global id may be drawn."""
        return any(draw.holds(row) for draw in self.order.used().values())


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


def plan_segments(
    config: TrainConfig, spans: Sequence[StageSpan], sources: Sequence[PlanSource]
) -> tuple[Segment, ...]:
    """The segments of all stages, in order, with what is wrong with ties. Raises UserError that names the key."""
    found: list[Segment] = []
    given = np.zeros(len(sources), np.int64)  # rows of each source that were taken before
    batch = config.data.global_batch_rows
    for span in spans:
        cutter = _Cutter(config, span, stage_mixture(span, sources), sources)
        parts = cutter.parts()
        check_scored(config.rescoring, span, [first for first, *_ in parts])
        ends = [*(first for first, *_ in parts[1:]), span.end_step]
        for number, ((first, pools, ties), end) in enumerate(zip(parts, ends, strict=True)):
            cutter.check_sizes(number, pools)
            found.append(replace(cutter.segment(number, first, pools, given), ties=ties))
            given = given + cutter.mixture.counts((end - first) * batch)
        if not span.stage.repeat:
            _check_no_repeat(span, found, sources, given)
    return tuple(found)


def check_scored(rescoring: Rescoring | None, span: StageSpan, starts: Sequence[int]) -> None:
    """Refuse parts of a stage that ranks rows by rescoring, if they do not begin exactly where rows are scored.

    Else a pool would change within a part, or follow scores of long ago. Raises UserError that says what would do.
    """
    if rescoring is None or not rescoring.ranks(span.stage):
        return
    every, first, end = rescoring.every_steps, span.first_step, span.end_step
    scored = list(range(-(-first // every) * every, end, every))
    if list(starts) == scored:
        return
    key, steps = f"curriculum.{span.index}", end - first
    if first % every:
        cure = (
            f"let the stage begin at a multiple of {every} (until of the stage before), or change rescoring.every_steps"
        )
    elif steps % every:
        fits = [number for number in range(1, steps + 1) if steps % number == 0 and first % number == 0]
        nearest = min(fits, key=lambda number: abs(number - every))
        cure = f"set rescoring.every_steps: {nearest} and {key}.rows.segments: {steps // nearest}"
    else:
        cure = f"set {key}.rows.segments: {steps // every}"
    raise UserError(
        f"{key}.rows ranks rows by {rescoring.name!r}, so each of its parts must begin where rows are scored, at every "
        f"{every} steps (rescoring.every_steps): the stage holds the steps {first} to {end - 1}, its {len(starts)} "
        f"parts begin at {_some(starts)}, rows are scored before {_some(scored)}; {cure}"
    )


def _some(steps: Sequence[int]) -> str:
    shown = ", ".join(str(step) for step in steps[:4])
    return f"{shown}, ..." if len(steps) > 4 else shown or "none of them"


def segments_digest(segments: Sequence[Segment], *, rescoring: Rescoring | None = None) -> str:
    """sha256 (hex) of all that the rows of these segments depend on beside the sources, the seed and the mode.

    Of what is ranked by rescoring it takes the rule: its scores change in the run, and checkpoints hold them.
    """
    digest = hashlib.sha256()
    for segment in segments:
        weights = segment.order.mixture.weights
        if len(weights) > 1:
            digest.update(f"mix {weights} ".encode())
        for number, draw in segment.order.used().items():
            if len(weights) > 1:
                digest.update(f"source {number} from {draw.start} ".encode())
            pool = draw.pool
            if rescoring is not None and rescoring.ranks(segment.span.stage):
                rows, pool = _ranking(segment).encode(), None
            else:
                rows = b"all" if pool is None else b""
            num_bytes = len(rows) if pool is None else 8 * len(pool)
            digest.update(f"{segment.first_batch} {segment.stream} {num_bytes} ".encode() + rows)
            for first in range(0, 0 if pool is None else len(pool), _HASHED_AT_ONCE):
                assert pool is not None
                digest.update(pool[first : first + _HASHED_AT_ONCE].astype("<i8").tobytes())
    return digest.hexdigest()


def stage_mixture(span: StageSpan, sources: Sequence[PlanSource]) -> Mixture:
    """Weights of the sources in a stage: as its mix says, or by their numbers of rows."""
    mix = span.stage.mix
    shares = [source.num_rows if mix is None else mix.get(source.name, 0.0) for source in sources]
    return Mixture(whole_weights(shares))


def _ranking(segment: Segment) -> str:
    """By what rule the rows of a segment are chosen, and how many."""
    selector = segment.span.stage.rows
    assert selector is not None
    score = selector.score
    of = [(reference.store, reference.stat, reference.rank_first) for reference in score.of]
    return f"{segment.pool_size} by {score.kind} of {of} {score.fusion_k} {selector.keep}"


@dataclass(frozen=True)
class _Cutter:
    """Makes the segments of one stage."""

    config: TrainConfig
    span: StageSpan
    mixture: Mixture
    sources: Sequence[PlanSource]

    def parts(self) -> list[tuple[int, list[Pool], tuple[str, ...]]]:
        """First batch, the pool of each source, and what is wrong with ties, of every segment."""
        span, selector = self.span, self.span.stage.rows
        if selector is None:
            return [(span.first_step, [None] * len(self.sources), ())]
        steps = span.end_step - span.first_step
        count = min(selector.segments, steps)
        places = [number / max(count - 1, 1) for number in range(count)]
        windows = [(scalar_value(selector.share, x), scalar_value(selector.skip, x)) for x in places]
        of_sources = [
            source_pools(selector, source, windows, seed=self._seed(number), key=self._key(number)) if weight else None
            for number, (source, weight) in enumerate(zip(self.sources, self.mixture.weights, strict=True))
        ]
        found: list[tuple[int, list[Pool], tuple[str, ...]]] = []
        for number in range(count):
            pools = [None if own is None else own.pools[number] for own in of_sources]
            ties = tuple(text for own in of_sources if own is not None for text in own.ties[number])
            found.append((span.first_step + number * steps // count, pools, ties))
        return found

    def segment(self, part: int, first_batch: int, pools: Sequence[Pool], given: NDArray[np.int64]) -> Segment:
        """Part number `part` of the stage; given [sources]: rows of each that were taken before it."""
        # Pools of all rows are gone through on the main stream, as if nothing had been selected.
        is_plain = all(rows is None for rows in pools)
        stream = 0 if is_plain else 1 + self.span.index * 1000 + part
        draws: list[Draw | None] = []
        first_row = 0
        for number, source in enumerate(self.sources):
            rows = pools[number]
            size = source.num_rows if rows is None else len(rows)
            order = RowOrder(size, seed=self._seed(number), mode=self.config.data.order, stream=stream)
            draw = Draw(order, first_row=first_row, start=int(given[number]) if is_plain else 0, pool=rows)
            draws.append(draw if self.mixture.weights[number] else None)
            first_row += source.num_rows
        return Segment(first_batch, self.span, MixedOrder(self.mixture, draws), stream)

    def check_sizes(self, part: int, pools: Sequence[Pool]) -> None:
        """Refuse a source that has not even the rows of one batch. Raises UserError that names the key."""
        total, batch = sum(self.mixture.weights), self.config.data.global_batch_rows
        for number, weight in enumerate(self.mixture.weights):
            source, rows = self.sources[number], pools[number]
            needed = -(-weight * batch // total)
            if rows is not None and len(rows) < needed:
                raise UserError(
                    f"{self._key(number)}: part {part} of the stage keeps {len(rows)} of {source.num_rows} rows, fewer "
                    f"than {self._needed(needed)}; raise share or lower data.global_batch_rows"
                )
            if source.num_rows < needed:
                raise UserError(
                    f"data.sources.{source.name}.tokens holds {source.num_rows} rows, fewer than "
                    f"{self._needed(needed)} in stage curriculum.{self.span.index}; give it a smaller share (mix), "
                    "more text, or lower data.global_batch_rows"
                )

    def _needed(self, rows: int) -> str:
        batch = self.config.data.global_batch_rows
        return f"a global batch of {batch}" if rows == batch else f"its {rows} rows of a global batch of {batch}"

    def _key(self, number: int) -> str:
        key = f"curriculum.{self.span.index}.rows"
        return key if len(self.sources) == 1 else f"{key}, source {self.sources[number].name}"

    def _seed(self, number: int) -> int:
        """A run with one source has the order that it always had."""
        seed = self.config.run.seed
        return seed if len(self.sources) == 1 else source_seed(seed, self.sources[number].name)


def _check_no_repeat(
    span: StageSpan, segments: Sequence[Segment], sources: Sequence[PlanSource], given: NDArray[np.int64]
) -> None:
    """Refuse a stage of which a row would have been read before it ends; given [sources]: rows taken up to there."""
    key = f"curriculum.{span.index}.repeat is false, but"
    for number in segments[-1].order.used():
        source = sources[number]
        place = "data.tokens" if len(sources) == 1 else f"data.sources.{source.name}.tokens"
        for segment in segments:
            if segment.span.stage.rows is not None and number in segment.order.used():
                raise UserError(
                    f"{key} stage curriculum.{segment.span.index} before it selects rows of {place} (rows), which come "
                    "in an order of their own; remove that selector, or allow repetition"
                )
        if given[number] > source.num_rows:
            raise UserError(
                f"{key} up to step {span.end_step} the run takes {given[number]} rows of {place}, which holds "
                f"{source.num_rows}; make the run or the stage shorter, lower the source's share (mix), or allow "
                "repetition"
            )
