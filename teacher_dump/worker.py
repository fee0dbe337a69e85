"""One worker of `dump` or `score`: open, check, load, walk the missing units of its share, seal if that was all."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from potstill.common.errors import UserError
from potstill.common.progress import Progress, format_seconds
from potstill.storage import (
    CommitRecord,
    CorruptError,
    KBound,
    RunSpec,
    StoreReader,
    StoreWriter,
    TokensRow,
    check_sealed,
    seal_store,
)
from potstill.teacher_dump.batches import TeacherBatch, apart_batch, packed_batch
from potstill.teacher_dump.config import TeacherConfig, WalkConfig
from potstill.teacher_dump.engine_mix import EngineMix, ParityProbe, engine_mix
from potstill.teacher_dump.engines.base import OneProcess
from potstill.teacher_dump.identity import check_fits, computing_dtype, describe, load_config, members
from potstill.teacher_dump.left_out import LeftOut
from potstill.teacher_dump.pipeline import HostResult, Walk, WalkTotals
from potstill.teacher_dump.placing import WorkerPlace
from potstill.teacher_dump.stopping import StopFlag

if TYPE_CHECKING:
    from potstill.teacher_dump.engines.base import Ranks, TeacherEngine, TopKWanted

log = logging.getLogger(__name__)

_MUCH_EXCLUDED = 1e-3
_ALONE = WorkerPlace(0, 1, "arguments")


class StoppedError(UserError):
    """A signal ended the worker before its share was done; what is committed is safe."""

    def __init__(self, message: str, signal_name: str = "") -> None:
        super().__init__(message, signal_name)
        self.signal_name = signal_name  # SIGTERM, SIGUSR1; something else where another rank of a group was asked

    def __str__(self) -> str:
        return str(self.args[0])


class Job(Protocol):
    """What `dump` and `score` differ in."""

    word: str
    mixes: ClassVar[bool] = True  # whether its units may be those of several engines: they are made by one forward pass

    def spec(self, tokens: StoreReader, teacher: dict[str, object]) -> RunSpec:
        """run.json of the store to write."""

    def id_frequencies(self, tokens: StoreReader) -> NDArray[np.int64] | None:
        """Occurrences [V] by which the store ranks its ids; None where it keeps them as they are."""
        return None

    def left_out(self, spec: RunSpec) -> LeftOut | None:
        """Which rows the model is not run over; None where it is run over all."""
        return None

    def wanted(self, vocab_size: int) -> TopKWanted | None:
        """What an engine that gives a finished top-k must put into it; None where draws are made."""

    def compute(self, engine: TeacherEngine, batch: TeacherBatch, vocab_size: int) -> HostResult:
        """Run the model over a batch; the result finishes in another thread."""

    def beside(self, tokens: StoreReader) -> StoreWriter | None:
        """The writer of a second store, of the same units, that comes of the same work; None: there is none."""
        return None

    def k_bound(self, figures: Mapping[str, float]) -> KBound | None:
        """How often the selection stopped at k, from the sums of `BatchRows`; None where it has no such bound."""
        return None


@dataclass(frozen=True)
class WorkerSummary:
    """What a worker did, and how the store stands after it."""

    path: str
    word: str
    worker: int
    num_workers: int
    units: int
    rows: int
    tokens: int
    refused_rows: tuple[int, ...]
    excluded_mass: float  # mean softmax mass on ids that no tokenizer entry has
    seconds: float
    stage_seconds: Mapping[str, float]
    num_missing: int  # units of the whole store
    sealed: bool
    bytes_per_token: float | None  # of the sealed store, else of this worker's last unit
    k_bound: KBound | None  # over this worker's rows

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    def format(self) -> str:
        """A few lines for a person."""
        lines = [
            f"{self.word}: worker {self.worker} of {self.num_workers} did {self.units} units, {self.rows} rows, "
            f"{self.tokens} tokens in {format_seconds(self.seconds)} ({self.tokens_per_second:,.0f} tokens/s)"
            f" -> {self.path}"
        ]
        if self.k_bound is not None:
            lines.append(self.k_bound.describe(self.bytes_per_token))
        elif self.bytes_per_token is not None:
            lines.append(f"{self.bytes_per_token:.1f} B/token")
        if self.refused_rows:
            lines.append(
                f"refused rows, stored without targets: {len(self.refused_rows)} {list(self.refused_rows[:10])}"
            )
        if self.excluded_mass > 0:
            lines.append(f"mean mass on ids beyond the tokenizer, left out: {self.excluded_mass:.2g}")
        if self.sealed:
            lines.append("the store is complete and sealed")
        elif self.num_missing:
            lines.append(f"{self.num_missing} units are still missing; run again, or wait for the other workers")
        else:
            lines.append(f"the store is complete; seal it with: potstill seal {self.path}")
        return "\n".join(lines)


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

        return load_engine(self.teacher, self.job.wanted(self.tokens.spec.vocab_size))

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
        return sum(_num_wanted(self.writer, unit, self.left_out) for unit in units)

    def todo(self) -> list[int]:
        """Units of the whole store without a record. Raises StoreError where a sealed store is damaged."""
        return _todo(self.writer, _ALONE)

    def num_refused(self) -> int:
        """Refused rows of the whole store so far."""
        return self.writer.num_refused(allowed=self.refused_allowed())

    def refused_allowed(self) -> int:
        """Refused rows above which the work stops."""
        return _refused_allowed(self.config, self.writer, self.left_out)

    def warn_of_k(self, unit: int, totals: WalkTotals) -> None:
        """After the first unit: whether the selection stopped at k too often."""
        _warn_of_k(self.job, self.writer, self.left_out, unit, totals)

    def finish(self, totals: WalkTotals, *, seconds: float) -> WorkerSummary:
        """The end of a work that was looked after from one place, as that of a single worker. Raises as run_worker."""
        return _finish(self.config, self.job, self.writer, _ALONE, OneProcess(), totals, seconds=seconds)


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
    mix = engine_mix(config.output, spec) if job.mixes and not config.force else None
    spec = spec if mix is None else mix.spec(spec)
    ranking = job.id_frequencies(tokens)
    writer = StoreWriter.create(config.output, spec, force=config.force, id_frequencies=ranking)
    beside = job.beside(tokens)
    if beside is not None:
        check_sealed(beside.url)
        _check_beside(writer, beside, config.output)
    return Work(config, teacher, job, tokens, writer, beside, job.left_out(writer.spec), mix)


def run_worker(
    config: WalkConfig, teacher: TeacherConfig, job: Job, *, worker: int | None, num_workers: int | None
) -> WorkerSummary:
    """Do what is missing in this worker's share; seal when everything is there and there is one worker only.

    Nothing is loaded when nothing is missing. Raises UserError (bad input, too many refused rows, failed units),
    StoppedError after a signal, StoreError for trouble with the stores. Running it again continues.
    """
    from potstill.teacher_dump.engines.loading import join_ranks

    started = time.monotonic()
    ranks = join_ranks(teacher)
    place = ranks.place(
        config.worker if worker is None else worker, config.num_workers if num_workers is None else num_workers
    )
    work = open_work(config, teacher, job, num_workers=place.num_workers)
    writer = work.writer
    units = _todo(writer, place)
    log.info(
        "%s: worker %d of %d (%s) has %d units to do",
        job.word,
        place.worker,
        place.num_workers,
        place.source,
        len(units),
    )
    # A rank without units of its own takes part in the passes of the others.
    passes = sum(-(-work.num_wanted([unit]) // teacher.batch_rows) for unit in units)
    most_passes = ranks.largest(passes)
    totals = WalkTotals()
    if most_passes or units:
        idle = most_passes - passes
        totals = _walk(work, units, ranks, idle_passes=idle)
    if totals.stopped_by is not None:
        raise StoppedError(
            f"{job.word}: stopped by {totals.stopped_by} after {totals.units} of {len(units)} units of worker "
            f"{place.worker}; what is committed is safe, run the same command again to go on",
            totals.stopped_by,
        )
    return _finish(config, job, writer, place, ranks, totals, seconds=time.monotonic() - started)


def _todo(writer: StoreWriter, place: WorkerPlace) -> list[int]:
    """Units of this worker's share without a record. Raises StoreError where a sealed store is damaged.

    Whether it is sealed is asked first: a store that others complete and seal meanwhile has no unit to do then.
    """
    sealed = check_sealed(writer.url, spec=writer.spec)
    units = writer.todo(worker=place.worker, num_workers=place.num_workers, sealed=sealed)
    if sealed and units:
        raise CorruptError(
            f"{writer.url} is sealed, but {len(units)} of its units have no readable record (first: {units[:5]}); run "
            f"`potstill repair {writer.url}`, then this command again"
        )
    return units


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


def open_rows(config: WalkConfig) -> StoreReader:
    """The tokens store; UserError when the store is of another kind, StoreError when it cannot be read."""
    tokens = StoreReader(config.tokens)
    if tokens.spec.kind != "tokens":
        raise UserError(f"{config.tokens} is a store of {tokens.spec.kind}, expected a tokens store made by prepare")
    return tokens


def _walk(work: Work, units: list[int], ranks: Ranks, *, idle_passes: int) -> WalkTotals:
    config, job, writer, left_out = work.config, work.job, work.writer, work.left_out
    engine = work.load_engine()
    notes = work.notes_of(engine, ranks)
    own, allowed = set(units), work.refused_allowed()
    with StopFlag() as stop, Progress(work.num_wanted(units), description=job.word) as progress:
        began = time.monotonic()
        num_tokens = 0

        def on_rows(rows: int, row_tokens: int) -> None:
            nonlocal num_tokens
            num_tokens += row_tokens
            progress.note(tokens_per_second=round(num_tokens / max(time.monotonic() - began, 1e-9)))
            progress.update(rows)

        def stop_reason() -> str | None:
            return ranks.agree_to_stop(stop.signal_name)

        walk = build_walk(
            work,
            engine,
            notes=notes,
            # One rank that skips a unit would leave the others waiting for it.
            max_consecutive_failures=1 if ranks.in_step else config.max_consecutive_failures,
            refused_elsewhere=lambda: writer.num_refused(allowed=allowed, except_units=own),
            on_rows=on_rows,
            on_unit=partial(_warn_of_k, job, writer, left_out),
            stop_reason=stop_reason,
        )
        totals = walk.run(units)
        while idle_passes and totals.stopped_by is None:
            totals.stopped_by = stop_reason()
            if totals.stopped_by is None:
                engine.idle_pass()
                idle_passes -= 1
    return totals


def build_walk(
    work: Work,
    engine: TeacherEngine,
    *,
    notes: Mapping[str, Any],
    max_consecutive_failures: int,
    refused_elsewhere: Callable[[], int],
    on_rows: Callable[[int, int], None],
    on_unit: Callable[[int, WalkTotals], None],
    stop_reason: Callable[[], str | None],
) -> Walk:
    """The walk of a loaded teacher over units of its work; see Walk for what is to be given."""
    return Walk(
        reader=work.tokens,
        writer=work.writer,
        compute=lambda batch: work.job.compute(engine, batch, work.tokens.spec.vocab_size),
        layout=work.layout,
        batch_rows=work.teacher.batch_rows,
        finish_threads=work.config.finish_threads,
        max_consecutive_failures=max_consecutive_failures,
        refused_elsewhere=refused_elsewhere,
        refused_allowed=work.refused_allowed(),
        left_out=work.left_out,
        on_rows=on_rows,
        on_unit=on_unit,
        stop_reason=stop_reason,
        beside=work.beside,
        notes=notes,
    )


def _warn_of_k(job: Job, writer: StoreWriter, left_out: LeftOut | None, unit: int, totals: WalkTotals) -> None:
    """Say it with the first unit, when a change costs minutes and not days."""
    if totals.units != 1:
        return
    bound = job.k_bound(totals.figures)
    if bound is not None and bound.much:
        log.warning("after the first unit: %s", bound.describe(_bytes_per_token(writer, unit, left_out)))


def _bytes_per_token(writer: StoreWriter, unit: int | None, left_out: LeftOut | None) -> float | None:
    record = None if unit is None else writer.record(unit)
    return None if record is None else record.num_bytes / max(1, _tokens_run(writer, record, left_out))


def _tokens_run(writer: StoreWriter, record: CommitRecord, left_out: LeftOut | None) -> int:
    """Tokens of a unit that the model was run over: rows that were left out take no room, and lower no figure."""
    rows = zip(writer.unit_rows(record.unit), record.num_tokens, strict=True)
    return sum(int(count) for row, count in rows if left_out is None or left_out.wanted[row])


def _num_wanted(writer: StoreWriter, unit: int, left_out: LeftOut | None) -> int:
    rows = writer.unit_rows(unit)
    return len(rows) if left_out is None else left_out.count(rows)


def _refused_allowed(config: WalkConfig, writer: StoreWriter, left_out: LeftOut | None) -> int:
    assert writer.spec.num_rows is not None
    num_rows = writer.spec.num_rows if left_out is None else left_out.count(range(writer.spec.num_rows))
    return int(config.max_rejected_fraction * num_rows)


def _check_refused(config: WalkConfig, writer: StoreWriter, left_out: LeftOut | None) -> None:
    """Raise UserError when the workers of a complete store have refused too many rows together."""
    allowed = _refused_allowed(config, writer, left_out)
    refused = writer.num_refused(allowed=allowed)
    if refused > allowed:
        raise UserError(
            f"{config.output}: {refused} rows are refused, {allowed} are allowed (max_rejected_fraction); the commit "
            "records list them. Check the teacher's dtype and begin again with force, or raise the limit"
        )


def _finish(
    config: WalkConfig,
    job: Job,
    writer: StoreWriter,
    place: WorkerPlace,
    ranks: Ranks,
    totals: WalkTotals,
    *,
    seconds: float,
) -> WorkerSummary:
    if totals.failures:
        listed = "; ".join(f"unit {unit}: {reason}" for unit, reason in list(totals.failures.items())[:5])
        raise UserError(
            f"{job.word}: {len(totals.failures)} units failed and {totals.units} were committed: {listed}. "
            "Run the same command again to retry them"
        )
    ranks.barrier()
    num_missing = len(writer.todo())
    left_out = job.left_out(writer.spec)
    if num_missing == 0:
        _check_refused(config, writer, left_out)
    bytes_per_token = _bytes_per_token(writer, totals.last_unit, left_out)
    sealed = False
    if config.seal and place.num_workers == ranks.world and num_missing == 0:
        manifest = seal_store(config.output, fast=config.fast_seal)
        num_tokens = manifest.num_tokens
        if left_out is not None:
            num_tokens = int(StoreReader(config.output).row_lengths[np.asarray(left_out.wanted)].sum())
        sealed, bytes_per_token = True, manifest.num_bytes / max(1, num_tokens)
    positions = totals.figures.get("positions", 0.0)
    excluded = totals.figures.get("excluded_mass", 0.0) / positions if positions else 0.0
    if excluded > _MUCH_EXCLUDED:
        log.warning(
            "the teacher puts %.2g of its mass on ids beyond the tokenizer's %d entries; it is left out, but check "
            "that this tokenizer is the teacher's",
            excluded,
            writer.spec.vocab_size,
        )
    return WorkerSummary(
        path=config.output,
        word=job.word,
        worker=place.worker,
        num_workers=place.num_workers,
        units=totals.units,
        rows=totals.rows,
        tokens=totals.tokens,
        refused_rows=tuple(item.row for item in totals.refused),
        excluded_mass=excluded,
        seconds=seconds,
        stage_seconds=dict(totals.seconds),
        num_missing=num_missing,
        sealed=sealed,
        bytes_per_token=bytes_per_token,
        k_bound=job.k_bound(totals.figures),
    )
