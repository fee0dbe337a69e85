"""One worker of `dump` or `score`: open, check, load, walk the missing units of its share, seal if that was all."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

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
    check_sealed,
    seal_store,
)
from potstill.teacher_dump.batches import TeacherBatch, apart_batch, packed_batch
from potstill.teacher_dump.config import TeacherConfig, WalkConfig
from potstill.teacher_dump.identity import check_fits, computing_dtype, describe, load_config, members
from potstill.teacher_dump.left_out import LeftOut
from potstill.teacher_dump.pipeline import HostResult, Walk, WalkTotals
from potstill.teacher_dump.placing import WorkerPlace
from potstill.teacher_dump.stopping import StopFlag

if TYPE_CHECKING:
    from potstill.teacher_dump.engines.base import Ranks, TeacherEngine, TopKWanted

log = logging.getLogger(__name__)

_MUCH_EXCLUDED = 1e-3


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
    tokens = open_rows(config)
    model_config = load_config(teacher)
    check_fits(teacher, model_config, tokens.spec)
    for member, _ in members(teacher):
        check_fits(member, load_config(member), tokens.spec)
    dtype = computing_dtype(teacher, model_config)
    spec = job.spec(tokens, dict(describe(teacher, model_config, dtype=dtype)))
    # Deleting is for one worker: the others would delete what the first has begun.
    if config.force and place.num_workers > 1:
        raise UserError("force deletes the store and may be used by a single worker only; delete it first")
    ranking = job.id_frequencies(tokens)
    writer = StoreWriter.create(config.output, spec, force=config.force, id_frequencies=ranking)
    beside = job.beside(tokens)
    if beside is not None:
        check_sealed(beside.url)
        _check_beside(writer, beside, config.output)
    units = _todo(writer, place)
    log.info(
        "%s: worker %d of %d (%s) has %d units to do",
        job.word,
        place.worker,
        place.num_workers,
        place.source,
        len(units),
    )
    left_out = job.left_out(writer.spec)
    # A rank without units of its own takes part in the passes of the others.
    passes = sum(-(-_num_wanted(writer, unit, left_out) // teacher.batch_rows) for unit in units)
    most_passes = ranks.largest(passes)
    totals = WalkTotals()
    if most_passes or units:
        idle = most_passes - passes
        totals = _walk(config, teacher, job, tokens, writer, units, ranks, left_out, idle_passes=idle, beside=beside)
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
    sealed = check_sealed(writer.url)
    units = writer.todo(worker=place.worker, num_workers=place.num_workers)
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


def _walk(
    config: WalkConfig,
    teacher: TeacherConfig,
    job: Job,
    tokens: StoreReader,
    writer: StoreWriter,
    units: list[int],
    ranks: Ranks,
    left_out: LeftOut | None,
    *,
    idle_passes: int,
    beside: StoreWriter | None = None,
) -> WalkTotals:
    from potstill.teacher_dump.engines.loading import load_engine

    engine = load_engine(teacher, job.wanted(tokens.spec.vocab_size))
    # A compiled model would be compiled again for each length.
    packed = partial(packed_batch, length=tokens.spec.row_length, fixed=teacher.compile)
    own = set(units)
    num_rows = sum(_num_wanted(writer, unit, left_out) for unit in units)
    with StopFlag() as stop, Progress(num_rows, description=job.word) as progress:
        began = time.monotonic()
        num_tokens = 0

        def on_rows(rows: int, row_tokens: int) -> None:
            nonlocal num_tokens
            num_tokens += row_tokens
            progress.note(tokens_per_second=round(num_tokens / max(time.monotonic() - began, 1e-9)))
            progress.update(rows)

        def stop_reason() -> str | None:
            return ranks.agree_to_stop(stop.signal_name)

        walk = Walk(
            reader=tokens,
            writer=writer,
            compute=lambda batch: job.compute(engine, batch, tokens.spec.vocab_size),
            layout=packed if teacher.documents == "packed" else apart_batch,
            batch_rows=teacher.batch_rows,
            finish_threads=config.finish_threads,
            # One rank that skips a unit would leave the others waiting for it.
            max_consecutive_failures=1 if ranks.in_step else config.max_consecutive_failures,
            refused_elsewhere=lambda: _num_refused(writer, except_units=own),
            refused_allowed=_refused_allowed(config, writer, left_out),
            left_out=left_out,
            on_rows=on_rows,
            on_unit=partial(_warn_of_k, job, writer, left_out),
            stop_reason=stop_reason,
            beside=beside,
        )
        totals = walk.run(units)
        while idle_passes and totals.stopped_by is None:
            totals.stopped_by = stop_reason()
            if totals.stopped_by is None:
                engine.idle_pass()
                idle_passes -= 1
    return totals


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
    return sum(count for row, count in rows if left_out is None or left_out.wanted[row])


def _num_refused(writer: StoreWriter, *, except_units: Collection[int] = ()) -> int:
    records = writer.committed()
    return sum(len(record.extra.get("refused", ())) for unit, record in records.items() if unit not in except_units)


def _num_wanted(writer: StoreWriter, unit: int, left_out: LeftOut | None) -> int:
    rows = writer.unit_rows(unit)
    return len(rows) if left_out is None else left_out.count(rows)


def _refused_allowed(config: WalkConfig, writer: StoreWriter, left_out: LeftOut | None) -> int:
    assert writer.spec.num_rows is not None
    num_rows = writer.spec.num_rows if left_out is None else left_out.count(range(writer.spec.num_rows))
    return int(config.max_rejected_fraction * num_rows)


def _check_refused(config: WalkConfig, writer: StoreWriter, left_out: LeftOut | None) -> None:
    """Raise UserError when the workers of a complete store have refused too many rows together."""
    refused, allowed = _num_refused(writer), _refused_allowed(config, writer, left_out)
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
            num_tokens = sum(_tokens_run(writer, record, left_out) for record in writer.committed().values())
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
