"""The walk of a teacher over the units of a store: read ahead, run the model, finish and commit beside it.

The calling thread drives the model only. One thread reads and lays out the next unit; `finish_threads` threads turn
results into rows, encode and commit. What is under way is bounded (units read ahead, batches and units unfinished),
and an error in any thread comes out at the next step of the walk.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from potstill.common.errors import UserError
from potstill.storage import HungReadError, Prefetcher, Row, StoreReader, StoreWriter, TokensRow, WriteFailedError
from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.left_out import LeftOut
from potstill.teacher_dump.selection import Refused

log = logging.getLogger(__name__)

_UNITS_AHEAD = 1
_UNITS_UNFINISHED = 2
_RECOUNT_SECONDS = 30.0  # counting may mean reading many records, so not for every refused row

FinishedRow = tuple[Row, Refused | None]


class WalkEndedError(UserError):
    """The walk may not go on. Any other error fails the unit that it came up in, and the next one is begun."""


class HostResult(Protocol):
    """Result of a batch on its way to the host."""

    def rows(self) -> BatchRows:
        """Wait for the copy, then cut the results into rows. Runs in a finishing thread."""


@dataclass(frozen=True)
class BatchRows:
    """Rows of one batch; `figures` are sums that the worker adds up (e.g. excluded mass) and notes in its records.

    `shown` are further sums, added up for the summary and not noted anywhere. `beside` are rows for the store beside.
    """

    rows: Sequence[FinishedRow]
    figures: Mapping[str, float] = field(default_factory=dict)
    shown: Mapping[str, float] = field(default_factory=dict)
    beside: Sequence[Row] = ()


@dataclass
class WalkTotals:
    """What a walk has done so far. `seconds` by stage: model (calling thread), waiting for input, for the finishers."""

    units: int = 0
    rows: int = 0
    tokens: int = 0
    refused: list[Refused] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"model": 0.0, "wait_input": 0.0, "wait_finish": 0.0})
    stopped_by: str | None = None
    last_unit: int | None = None  # committed


@dataclass(frozen=True)
class _Unit:
    number: int
    batches: list[TeacherBatch]
    left_out: Sequence[Row]  # rows that the model is not run over, as they are stored


class Walk:
    """Run `compute` over the given units of `reader` and commit the rows to `writer`.

    `compute(batch)` runs in the calling thread; the object it returns finishes in another. Rows of `left_out` are
    stored without it. `refused_allowed` is the number of refused rows above which the run stops; `refused_elsewhere()`
    counts those in the units of others and of earlier runs: all workers together may not have more than that. `beside`
    is a store of the same units whose rows come of the same work (`BatchRows.beside`): a unit is committed there first,
    and is there when `writer` has it. `notes` go into `extra` of every record.
    """

    def __init__(
        self,
        *,
        reader: StoreReader,
        writer: StoreWriter,
        compute: Callable[[TeacherBatch], HostResult],
        layout: Callable[[Sequence[TokensRow]], TeacherBatch],
        batch_rows: int,
        finish_threads: int,
        max_consecutive_failures: int,
        refused_elsewhere: Callable[[], int],
        refused_allowed: int,
        left_out: LeftOut | None = None,
        on_rows: Callable[[int, int], None] = lambda rows, tokens: None,
        on_unit: Callable[[int, WalkTotals], None] = lambda unit, totals: None,
        stop_reason: Callable[[], str | None] = lambda: None,
        beside: StoreWriter | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self._notes = dict(notes or {})
        self._reader, self._writer, self._beside = reader, writer, beside
        self._compute, self._layout = compute, layout
        self._batch_rows, self._left_out = batch_rows, left_out
        self._finish_threads = finish_threads
        self._max_consecutive_failures = max_consecutive_failures
        self._refused_elsewhere, self._refused_allowed = refused_elsewhere, refused_allowed
        self._num_elsewhere, self._counted_at = refused_elsewhere(), time.monotonic()
        self._on_rows, self._on_unit, self._stop_reason = on_rows, on_unit, stop_reason
        self._consecutive_failures = 0
        self._unit_began = 0.0
        self._news: list[Committed] = []
        self.totals = WalkTotals()

    def run(self, units: Sequence[int]) -> WalkTotals:
        """Do the units in order. Raises WriteFailedError, HungReadError or WalkEndedError (refused rows, failures)."""
        with closing(self.each(units)) as committed:
            for _ in committed:
                pass
        return self.totals

    def each(self, units: Sequence[int]) -> Generator[Committed, None, None]:
        """As `run`, with each unit soon after it is committed; the units of `totals.failures` are not among them."""
        unfinished: deque[tuple[int, Future[Committed]]] = deque()
        self._unit_began = time.perf_counter()
        # A daemon thread: one that waits for a read that hangs must not be waited for at the end.
        reading: Prefetcher[_Unit] = Prefetcher(num_threads=1, name="read-ahead")
        with ThreadPoolExecutor(self._finish_threads, thread_name_prefix="finish") as finishing:
            try:
                for number in self._read_ahead(reading, units):
                    self._step(number, reading, finishing, unfinished)
                    while len(unfinished) >= _UNITS_UNFINISHED:
                        self._collect(unfinished)
                    yield from self._take_news()
                    if self.totals.stopped_by is not None:
                        break
                while unfinished:
                    self._collect(unfinished)
                    yield from self._take_news()
            finally:
                # After an error nothing that has not begun shall begin; what runs is waited for.
                reading.close()
                finishing.shutdown(wait=True, cancel_futures=True)

    def _take_news(self) -> list[Committed]:
        news, self._news = self._news, []
        return news

    def _read_ahead(self, reading: Prefetcher[_Unit], units: Sequence[int]) -> Iterator[int]:
        """The units in order, each to be taken from `reading`, where the next one is under way by then."""
        for place, number in enumerate(units):
            begin = place + _UNITS_AHEAD if place else 0
            for ahead in units[begin : place + 1 + _UNITS_AHEAD]:
                reading.submit([partial(self._load, ahead)], lambda loaded: loaded[0])
            yield number

    def _load(self, number: int) -> _Unit:
        rows = self._reader.rows(self._writer.unit_rows(number))
        tokens, others = [row for row in rows if isinstance(row, TokensRow)], []
        if self._left_out is not None:
            others = [self._left_out.row(row) for row in tokens if not self._left_out.wanted[row.row]]
            tokens = [row for row in tokens if self._left_out.wanted[row.row]]
        step = self._batch_rows
        return _Unit(number, [self._layout(tokens[i : i + step]) for i in range(0, len(tokens), step)], others)

    def _step(
        self,
        number: int,
        reading: Prefetcher[_Unit],
        finishing: ThreadPoolExecutor,
        unfinished: deque[tuple[int, Future[Committed]]],
    ) -> None:
        parts: list[Future[BatchRows]] = []
        try:
            with _timed(self.totals.seconds, "wait_input"):
                unit = reading.take()
            for batch in unit.batches:
                while unfinished and unfinished[0][1].done():
                    self._collect(unfinished)  # a disk that is full must not wait for the end of this unit
                self.totals.stopped_by = self._stop_reason()
                if self.totals.stopped_by is not None:
                    log.warning(
                        "%s received: unit %d is abandoned, none of it is stored", self.totals.stopped_by, number
                    )
                    return
                with _timed(self.totals.seconds, "model"):
                    result = self._compute(batch)
                parts.append(finishing.submit(result.rows))
                self._wait_for_finishers(parts)
                self._on_rows(len(batch.rows), sum(len(row.tokens) for row in batch.rows))
        except (WalkEndedError, WriteFailedError, HungReadError):
            raise
        except Exception as error:
            self._failed(number, error)
            return
        # From the last unit to this one, waits and all: over a store these add up to the time of its workers.
        seconds, self._unit_began = time.perf_counter() - self._unit_began, time.perf_counter()
        unfinished.append((number, finishing.submit(self._commit, number, parts, unit.left_out, seconds)))

    def _wait_for_finishers(self, parts: list[Future[BatchRows]]) -> None:
        """Keep at most a few batches between the model and the finishing threads: they hold memory."""
        behind = len(parts) - 2 * self._finish_threads
        if behind > 0 and not parts[behind - 1].done():
            with _timed(self.totals.seconds, "wait_finish"):
                parts[behind - 1].exception()

    def _commit(
        self, number: int, parts: list[Future[BatchRows]], left_out: Sequence[Row], seconds: float
    ) -> Committed:
        # The parts were handed to the same threads before this call, so waiting for them cannot block without end.
        done = [part.result() for part in parts]
        finished = [row for part in done for row in part.rows]
        refused = [refused for _, refused in finished if refused is not None]
        figures, shown = _sums(part.figures for part in done), _sums(part.shown for part in done)
        rows = [row for row, _ in finished]
        extra: dict[str, Any] = {"figures": figures, "seconds": round(seconds, 6), **self._notes}
        if refused:
            extra["refused"] = [[item.row, item.reason] for item in refused]
        if refused and time.monotonic() - self._counted_at > _RECOUNT_SECONDS:
            self._num_elsewhere, self._counted_at = self._refused_elsewhere(), time.monotonic()
        # Row counts are added up here, at the one place where it is known that the rows are safe.
        if self._too_many(refused):
            return Committed(number, 0, 0, refused, figures | shown, too_many=True)
        if self._beside is not None:
            self._beside.commit_unit(number, [row for part in done for row in part.beside])
        in_order = sorted([*rows, *left_out], key=lambda row: row.row) if left_out else rows
        if refused:
            self._writer.note_refused(number, len(refused))
        self._writer.commit_unit(number, in_order, extra=extra)
        return Committed(number, len(rows), sum(_num_tokens(row) for row in rows), refused, figures | shown)

    def _too_many(self, refused: Sequence[Refused]) -> bool:
        return self._num_elsewhere + len(self.totals.refused) + len(refused) > self._refused_allowed

    def _collect(self, unfinished: deque[tuple[int, Future[Committed]]]) -> None:
        number, future = unfinished.popleft()
        try:
            with _timed(self.totals.seconds, "wait_finish"):
                done = future.result()
        except (WalkEndedError, WriteFailedError, HungReadError):
            raise
        except Exception as error:
            self._failed(number, error)
            return
        self._consecutive_failures = 0
        self.totals.refused += done.refused
        for item in done.refused:
            log.warning("row %d is refused and stored without targets: %s", item.row, item.reason)
        if done.too_many or self._too_many([]):
            raise WalkEndedError(self._refusal_text())
        self.totals.units, self.totals.last_unit = self.totals.units + 1, number
        self.totals.rows += done.num_rows
        self.totals.tokens += done.num_tokens
        for name, value in done.figures.items():
            self.totals.figures[name] = self.totals.figures.get(name, 0.0) + value
        self._news.append(done)
        self._on_unit(number, self.totals)

    def _failed(self, number: int, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        log.error("unit %d failed: %s", number, reason, exc_info=error)
        self._writer.record_failure(number, reason)
        self.totals.failures[number] = reason
        self._consecutive_failures += 1
        if self._consecutive_failures >= self._max_consecutive_failures:
            raise WalkEndedError(
                f"unit {number}: failure {self._consecutive_failures} in a row, the worker stops; the last one was "
                f"{reason}. Committed units are safe; remove the cause and run the same command again"
            ) from error

    def _refusal_text(self) -> str:
        listed = "; ".join(f"row {item.row}: {item.reason}" for item in self.totals.refused[:5])
        count = self._num_elsewhere + len(self.totals.refused)
        return (
            f"{count} rows are refused, {self._refused_allowed} are allowed (max_rejected_fraction): {listed}. "
            "A teacher that gives NaN or Inf is often one of the wrong dtype; check it, or raise the limit"
        )


@dataclass(frozen=True)
class Committed:
    """A unit whose record is there."""

    number: int
    num_rows: int
    num_tokens: int
    refused: list[Refused]
    figures: Mapping[str, float]
    too_many: bool = False


def _sums(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def _num_tokens(row: Row) -> int:
    if isinstance(row, TokensRow):
        return len(row.tokens)
    return row.targets.num_tokens if hasattr(row, "targets") else len(row.entropy)


class _timed:
    """Add the time of a block to an entry of a dictionary."""

    def __init__(self, into: dict[str, float], name: str) -> None:
        self._into, self._name = into, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._into[self._name] += time.perf_counter() - self._start
