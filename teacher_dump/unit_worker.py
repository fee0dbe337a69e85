"""A loaded teacher that does the units it is told to, for a driver that has the whole store in view.

The driver keeps the list of what is to do and hears of each unit as it is committed; neither trusts the other with the
store: a unit is there when its record is, whoever was told what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from potstill.storage import CommitRecord
from potstill.teacher_dump.config import TeacherConfig, WalkConfig
from potstill.teacher_dump.engines.base import OneProcess
from potstill.teacher_dump.job import Job, StoppedError
from potstill.teacher_dump.pipeline import Committed, WalkTotals
from potstill.teacher_dump.selection import Refused
from potstill.teacher_dump.stopping import StopFlag
from potstill.teacher_dump.work import Work, open_work

_NO_BOUND = 1 << 30


@dataclass(frozen=True)
class UnitDone:
    """A committed unit."""

    unit: int
    num_rows: int
    num_tokens: int
    refused: tuple[tuple[int, str], ...]  # row, reason
    figures: Mapping[str, float]


@dataclass(frozen=True)
class UnitFailed:
    """A unit that was tried, and why it is not there."""

    unit: int
    reason: str


class UnitWorker:
    """See above. Opens the stores and loads the teacher when it is made; raises UserError and StoreError as `dump`."""

    def __init__(self, config: WalkConfig, teacher: TeacherConfig, job: Job) -> None:
        self._work = open_work(config, teacher, job)
        self._engine = self._work.load_engine()
        self._notes = self._work.notes_of(self._engine, OneProcess())

    def run(
        self, units: Sequence[int], *, num_refused: int = 0, asked_to_stop: Callable[[], str | None] = lambda: None
    ) -> Iterator[UnitDone | UnitFailed]:
        """Do the units in order, and tell of each.

        `num_refused` counts the refused rows of the store before this call. Raises StoppedError after a signal (to the
        main thread) or when `asked_to_stop` gives a reason, and what Walk.run raises.
        """
        told: set[int] = set()
        with StopFlag() as stop:
            walk = self._work.walk(
                self._engine,
                notes=self._notes,
                max_consecutive_failures=_NO_BOUND,  # which failures end the work is for the driver to say
                refused_elsewhere=lambda: num_refused,
                on_rows=lambda rows, tokens: None,
                on_unit=lambda unit, totals: None,
                stop_reason=lambda: stop.signal_name or asked_to_stop(),
            )
            with closing(walk.each(units)) as committed:
                for done in committed:
                    yield from _failures(walk.totals, told)
                    yield _told(done)
        yield from _failures(walk.totals, told)
        if walk.totals.stopped_by is not None:
            raise StoppedError(
                f"{self._work.job.word}: a worker was stopped by {walk.totals.stopped_by} after {walk.totals.units} of "
                f"{len(units)} units; what is committed is safe"
            )


def _failures(totals: WalkTotals, told: set[int]) -> Iterator[UnitFailed]:
    for unit, reason in totals.failures.items():
        if unit not in told:
            told.add(unit)
            yield UnitFailed(unit, reason)


def _told(done: Committed) -> UnitDone:
    refused = tuple((item.row, item.reason) for item in done.refused)
    return UnitDone(done.number, done.num_rows, done.num_tokens, refused, done.figures)


def done_before(work: Work, unit: int) -> UnitDone | None:
    """What the record of a unit says, None where there is none: its worker was lost before it could tell."""
    record = work.writer.record(unit)
    return None if record is None else _of_record(record, len(work.writer.unit_rows(unit)))


def _of_record(record: CommitRecord, num_rows: int) -> UnitDone:
    refused = tuple((int(row), str(reason)) for row, reason in record.extra.get("refused", ()))
    figures = dict(record.extra.get("figures", {}))
    return UnitDone(record.unit, num_rows, sum(int(n) for n in record.num_tokens), refused, figures)


def add_to(totals: WalkTotals, done: UnitDone) -> None:
    """Count a unit; a driver does so once for each."""
    totals.units += 1
    totals.last_unit = done.unit
    totals.rows += done.num_rows
    totals.tokens += done.num_tokens
    totals.refused += [Refused(row, reason) for row, reason in done.refused]
    for name, value in done.figures.items():
        totals.figures[name] = totals.figures.get(name, 0.0) + value
