"""Work: a job on its open stores, checked, before a teacher is loaded; and the walk of a loaded one over its units."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from potstill.common.errors import UserError
from potstill.storage import CorruptError, MismatchError, RunSpec, StoreReader, StoreWriter, TokensRow, check_sealed
from potstill.teacher_dump.batches import TeacherBatch, apart_batch, packed_batch
from potstill.teacher_dump.config import TeacherConfig, WalkConfig
from potstill.teacher_dump.engine_mix import EngineMix, ParityProbe, engine_mix
from potstill.teacher_dump.identity import check_fits, computing_dtype, describe, load_config, members
from potstill.teacher_dump.job import Job
from potstill.teacher_dump.left_out import LeftOut
from potstill.teacher_dump.pipeline import Walk, WalkTotals
from potstill.teacher_dump.placing import WorkerPlace

if TYPE_CHECKING:
    from potstill.teacher_dump.engines.base import Ranks, TeacherEngine

log = logging.getLogger(__name__)

ALONE = WorkerPlace(0, 1, "arguments")


@dataclass(frozen=True)
class Work:
    """A job on its open stores, checked: what there is of it before a teacher is loaded."""

    config: WalkConfig
    teacher: TeacherConfig
    job: Job
    tokens: StoreReader
    writer: StoreWriter
    beside: StoreWriter | None
    left_out: LeftOut | None
    mix: EngineMix | None = None  # where another engine began the store

    def load_engine(self) -> TeacherEngine:
        """The teacher, ready to run."""
        from potstill.teacher_dump.engines.loading import load_engine

        tokens = self.tokens.spec
        return load_engine(self.teacher, self.job.wanted(tokens.vocab_size), row_length=tokens.row_length)

    def layout(self, rows: Sequence[TokensRow]) -> TeacherBatch:
        """The batch of these rows."""
        if self.teacher.documents != "packed":
            return apart_batch(rows)
        # A compiled model would be compiled again for each length.
        return packed_batch(rows, length=self.tokens.spec.row_length, fixed=self.teacher.compile)

    def notes_of(self, engine: TeacherEngine, ranks: Ranks) -> dict[str, Any]:
        """What records of units say of the engine that made them: something where another engine began the store.

        Raises UserError where the two do not agree. A collective call of the ranks.
        """
        if self.mix is None:
            return {}
        probe = ParityProbe(
            mix=self.mix,
            tokens=self.tokens,
            writer=self.writer,
            engine=engine,
            ranks=ranks,
            compute=lambda batch: self.job.compute(engine, batch, self.tokens.spec.vocab_size),
            layout=self.layout,
            batch_rows=self.teacher.batch_rows,
            left_out=self.left_out,
        )
        return probe.check()

    def num_wanted(self, units: Iterable[int]) -> int:
        """Rows of these units that the model is to be run over."""
        rows = map(self.writer.unit_rows, units)
        return sum(len(one) if self.left_out is None else self.left_out.count(one) for one in rows)

    def todo(self, place: WorkerPlace = ALONE) -> list[int]:
        """Units of a worker's share without a record. Raises StoreError where a sealed store is damaged.

        Whether it is sealed is asked first: a store that others complete and seal meanwhile has no unit to do then.
        """
        writer = self.writer
        sealed = check_sealed(writer.url, spec=writer.spec)
        units = writer.todo(worker=place.worker, num_workers=place.num_workers, sealed=sealed)
        if sealed and units:
            raise CorruptError(
                f"{writer.url} is sealed, but {len(units)} of its units have no readable record (first: {units[:5]}); "
                f"run `potstill repair {writer.url}`, then this command again"
            )
        return units

    def num_refused(self, *, except_units: Collection[int] = ()) -> int:
        """Refused rows of the whole store so far."""
        return self.writer.num_refused(allowed=self.refused_allowed(), except_units=except_units)

    def refused_allowed(self) -> int:
        """Refused rows above which the work stops."""
        assert self.writer.spec.num_rows is not None
        every = range(self.writer.spec.num_rows)
        num_rows = len(every) if self.left_out is None else self.left_out.count(every)
        return int(self.config.max_rejected_fraction * num_rows)

    def check_refused(self) -> None:
        """Raise UserError when the workers of a complete store have refused too many rows together."""
        refused, allowed = self.num_refused(), self.refused_allowed()
        if refused > allowed:
            raise UserError(
                f"{self.config.output}: {refused} rows are refused, {allowed} are allowed (max_rejected_fraction); the "
                "commit records list them. Check the teacher's dtype and begin again with force, or raise the limit"
            )

    def bytes_per_token(self, unit: int | None) -> float | None:
        """Of a committed unit: rows that were left out take no room, and lower no figure."""
        record = None if unit is None else self.writer.record(unit)
        if record is None:
            return None
        rows = zip(self.writer.unit_rows(record.unit), record.num_tokens, strict=True)
        run = sum(int(count) for row, count in rows if self.left_out is None or self.left_out.wanted[row])
        return record.num_bytes / max(1, run)

    def warn_of_k(self, unit: int, totals: WalkTotals) -> None:
        """With the first unit, when a change costs minutes and not days: whether the selection stopped at k often."""
        if totals.units != 1:
            return
        bound = self.job.k_bound(totals.figures)
        if bound is not None and bound.much:
            log.warning("after the first unit: %s", bound.describe(self.bytes_per_token(unit)))

    def walk(
        self,
        engine: TeacherEngine,
        *,
        notes: Mapping[str, Any],
        max_consecutive_failures: int,
        refused_elsewhere: Callable[[], int],
        on_rows: Callable[[int, int], None],
        on_unit: Callable[[int, WalkTotals], None],
        stop_reason: Callable[[], str | None],
    ) -> Walk:
        """The walk of the loaded teacher over units; see Walk for what is to be given."""
        return Walk(
            reader=self.tokens,
            writer=self.writer,
            compute=lambda batch: self.job.compute(engine, batch, self.tokens.spec.vocab_size),
            layout=self.layout,
            batch_rows=self.teacher.batch_rows,
            finish_threads=self.config.finish_threads,
            max_consecutive_failures=max_consecutive_failures,
            refused_elsewhere=refused_elsewhere,
            refused_allowed=self.refused_allowed(),
            left_out=self.left_out,
            on_rows=on_rows,
            on_unit=on_unit,
            stop_reason=stop_reason,
            beside=self.beside,
            notes=notes,
        )


def open_work(config: WalkConfig, teacher: TeacherConfig, job: Job, *, num_workers: int = 1) -> Work:
    """Open the stores and hold the teacher against them; the store to write is made where it is not there yet.

    Raises UserError and StoreError; nothing is loaded.
    """
    tokens = open_rows(config)
    model_config = load_config(teacher)
    check_fits(teacher, model_config, tokens.spec)
    for member, _ in members(teacher):
        check_fits(member, load_config(member), tokens.spec)
    dtype = computing_dtype(teacher, model_config)
    spec = job.spec(tokens, dict(describe(teacher, model_config, dtype=dtype)))
    # Deleting is for one worker: the others would delete what the first has begun.
    if config.force and num_workers > 1:
        raise UserError("force deletes the store and may be used by a single worker only; delete it first")
    ranking = job.id_frequencies(tokens)
    writer, mix = _open_output(config, job, spec, ranking)
    beside = job.beside(tokens)
    if beside is not None:
        check_sealed(beside.url)
        _check_beside(writer, beside, config.output)
    return Work(config, teacher, job, tokens, writer, beside, job.left_out(writer.spec), mix)


def _open_output(
    config: WalkConfig, job: Job, spec: RunSpec, ranking: NDArray[np.int64] | None
) -> tuple[StoreWriter, EngineMix | None]:
    """The store to write, and the two engines where another one began it."""
    try:
        return StoreWriter.create(config.output, spec, force=config.force, id_frequencies=ranking), None
    except MismatchError:
        mix = engine_mix(config.output, spec) if job.mixes and not config.force else None
        if mix is None:
            raise
    return StoreWriter.create(config.output, mix.spec(spec), id_frequencies=ranking), mix


def open_rows(config: WalkConfig) -> StoreReader:
    """The tokens store; UserError when the store is of another kind, StoreError when it cannot be read."""
    tokens = StoreReader(config.tokens)
    if tokens.spec.kind != "tokens":
        raise UserError(f"{config.tokens} is a store of {tokens.spec.kind}, expected a tokens store made by prepare")
    return tokens


def _check_beside(writer: StoreWriter, beside: StoreWriter, output: str) -> None:
    """Raise UserError where the store beside lacks units that are done: no walk would come to them again."""
    undone = set(writer.todo())  # first: a unit that others finish meanwhile is there in the store beside
    lacking = [unit for unit in beside.todo() if unit not in undone]
    if lacking:
        raise UserError(
            f"{beside.url} lacks {len(lacking)} units whose figures stand in {output} (first: {lacking[:5]}): these "
            "were made with --keep none, or the folder was deleted or damaged since. `potstill repair "
            f"{beside.url}` takes these units out of both, to be made again by this command; or name another "
            "output, or begin again with --force"
        )
