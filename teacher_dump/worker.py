"""One worker of `dump` or `score`: open, check, load, walk the missing units of its share, seal if that was all."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import numpy as np

from potstill.common.errors import UserError
from potstill.common.progress import Progress
from potstill.storage import StoreReader, seal_store
from potstill.teacher_dump.config import TeacherConfig, WalkConfig
from potstill.teacher_dump.engines.base import OneProcess, TellsOfItself
from potstill.teacher_dump.job import Job, StoppedError, WorkerSummary
from potstill.teacher_dump.pipeline import WalkTotals
from potstill.teacher_dump.placing import WorkerPlace
from potstill.teacher_dump.stopping import StopFlag
from potstill.teacher_dump.work import ALONE, Work, open_work

if TYPE_CHECKING:
    from potstill.teacher_dump.engines.base import Ranks

log = logging.getLogger(__name__)

_MUCH_EXCLUDED = 1e-3


def run_worker(
    config: WalkConfig, teacher: TeacherConfig, job: Job, *, worker: int | None, num_workers: int | None
) -> WorkerSummary:
    """Do what is missing in this worker's share; seal when everything is there and there is one worker only.

    Nothing is loaded when nothing is missing. Raises UserError (bad input, too many refused rows, failed units),
    StoppedError after a signal, StoreError for trouble with the stores. Running it again continues.
    """
    from potstill.teacher_dump.engines.loading import join_ranks

    ranks = join_ranks(teacher)

    def work() -> WorkerSummary:
        place = ranks.place(
            config.worker if worker is None else worker, config.num_workers if num_workers is None else num_workers
        )
        return _do_share(config, teacher, job, place=place, ranks=ranks)

    return ranks.run(work)


def _do_share(
    config: WalkConfig, teacher: TeacherConfig, job: Job, *, place: WorkerPlace, ranks: Ranks
) -> WorkerSummary:
    started = time.monotonic()
    work = open_work(config, teacher, job, num_workers=place.num_workers)
    units = work.todo(place)
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
    return finish_work(work, totals, seconds=time.monotonic() - started, place=place, ranks=ranks)


def _walk(work: Work, units: list[int], ranks: Ranks, *, idle_passes: int) -> WalkTotals:
    engine = work.load_engine()
    notes = work.notes_of(engine, ranks)
    own = set(units)
    with StopFlag() as stop, Progress(work.num_wanted(units), description=work.job.word) as progress:
        began = time.monotonic()
        num_tokens = 0

        def on_rows(rows: int, row_tokens: int) -> None:
            nonlocal num_tokens
            num_tokens += row_tokens
            progress.note(tokens_per_second=round(num_tokens / max(time.monotonic() - began, 1e-9)))
            progress.update(rows)

        def stop_reason() -> str | None:
            return ranks.agree_to_stop(stop.signal_name)

        walk = work.walk(
            engine,
            notes=notes,
            # One rank that skips a unit would leave the others waiting for it.
            max_consecutive_failures=1 if ranks.in_step else work.config.max_consecutive_failures,
            refused_elsewhere=lambda: work.num_refused(except_units=own),
            on_rows=on_rows,
            on_unit=work.warn_of_k,
            stop_reason=stop_reason,
        )
        totals = walk.run(units)
        if isinstance(engine, TellsOfItself):
            log.info("%s: worker %s", work.job.word, engine.speed())
        while idle_passes and totals.stopped_by is None:
            totals.stopped_by = stop_reason()
            if totals.stopped_by is None:
                engine.idle_pass()
                idle_passes -= 1
    return totals


def finish_work(
    work: Work, totals: WalkTotals, *, seconds: float, place: WorkerPlace = ALONE, ranks: Ranks | None = None
) -> WorkerSummary:
    """The end of a worker's share, or of a work that was looked after from one place; seals where all of it is there.

    Raises as run_worker.
    """
    config, job, writer, left_out = work.config, work.job, work.writer, work.left_out
    ranks = OneProcess() if ranks is None else ranks
    if totals.failures:
        listed = "; ".join(f"unit {unit}: {reason}" for unit, reason in list(totals.failures.items())[:5])
        raise UserError(
            f"{job.word}: {len(totals.failures)} units failed and {totals.units} were committed: {listed}. "
            "Run the same command again to retry them"
        )
    ranks.barrier()
    num_missing = len(writer.todo())
    if num_missing == 0:
        work.check_refused()
    bytes_per_token = work.bytes_per_token(totals.last_unit)
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
