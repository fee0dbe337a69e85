"""hold_against_teacher: run sampled rows of a store again, twice, and compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill.common.errors import UserError
from potstill.common.progress import Progress
from potstill.storage import Row, RunSpec, StoreReader, TokensRow
from potstill.teacher_dump.against_teacher.config import AgainstTeacherConfig, job_config
from potstill.teacher_dump.against_teacher.distances import RowDistances, row_distances
from potstill.teacher_dump.against_teacher.report import TeacherReport
from potstill.teacher_dump.against_teacher.sample import open_tokens, sampled_rows
from potstill.teacher_dump.against_teacher.verdict import Judge
from potstill.teacher_dump.batches import TeacherBatch, apart_batch, packed_batch
from potstill.teacher_dump.config import DumpConfig, ScoreConfig, TeacherConfig
from potstill.teacher_dump.identity import check_fits, computing_dtype, describe, load_config, located, members
from potstill.teacher_dump.job import Job, WorkerSummary

if TYPE_CHECKING:
    from potstill.teacher_dump.engines.base import TeacherEngine

_ROWS_AT_ONCE = 64  # that are held in memory in all their versions


def hold_against_teacher(store_path: str, config: AgainstTeacherConfig) -> TeacherReport | None:
    """Run rows of the store through the teacher twice, and hold what is stored against them. Nothing is written.

    None on a rank that holds a part of the teacher of another one. Raises UserError for what cannot be compared,
    StoreError for trouble with the stores.
    """
    store = StoreReader(store_path, allow_partial=True)
    if store.spec.kind == "tokens":
        raise UserError(f"{store.url} is a store of tokens, which no teacher has made; expected targets or scores")
    tokens = open_tokens(store, config.tokens)
    made = job_config(config, store.spec, store=store.url, tokens=tokens.url)
    teacher = located(made.teacher if isinstance(made, DumpConfig) else made.model)
    from potstill.teacher_dump.engines.loading import join_ranks

    found: list[TeacherReport] = []

    def work() -> WorkerSummary:
        began = time.monotonic()
        found.append(_report(config, store, tokens, made, teacher))
        return _summary(found[0], began)

    join_ranks(teacher).run(work)  # the ranks of a group run the same rows, in step
    return found[0] if found else None


def _summary(report: TeacherReport, began: float) -> WorkerSummary:
    """What the other ranks of a teacher hear of the end."""
    return WorkerSummary(
        path=report.store,
        word="verify",
        worker=0,
        num_workers=1,
        units=0,
        rows=len(report.rows),
        tokens=report.positions,
        refused_rows=(),
        excluded_mass=0.0,
        seconds=time.monotonic() - began,
        stage_seconds={},
        num_missing=0,
        sealed=False,
        bytes_per_token=None,
        k_bound=None,
    )


def _report(
    config: AgainstTeacherConfig,
    store: StoreReader,
    tokens: StoreReader,
    made: DumpConfig | ScoreConfig,
    teacher: TeacherConfig,
) -> TeacherReport:
    differing = _look_at(teacher, store.spec, tokens.spec)
    numbers = sampled_rows(store, config.rows, seed=config.seed)
    live = _load(store, made, teacher)
    versions: list[RowDistances] = []
    refused: list[tuple[int, str]] = []
    silent: list[int] = []
    with Progress(2 * len(numbers), unit="rows", description="teacher") as progress:
        for first in range(0, len(numbers), _ROWS_AT_ONCE):
            here = numbers[first : first + _ROWS_AT_ONCE]
            rows = tokens.tokens_rows(here), store.rows(here)
            for one in live.versions(*rows, seed=config.seed, count=progress.update):
                if one.says_nothing:
                    silent.append(one.tokens.row)
                elif one.refused is not None:
                    refused.append((one.tokens.row, one.refused))
                else:
                    versions.append(one.distances())
    judge = Judge(spec=store.spec, rounding=None, rows=[row for row in versions if row.positions])
    elsewhere = replace(judge, rounding=live.engine.dtype).verdict()
    return TeacherReport(
        store=store.url,
        tokens=tokens.url,
        teacher=teacher.model,
        engine=live.engine.name,
        dtype=live.engine.dtype,
        num_rows=store.num_rows,
        sealed_rows=store.spec.num_rows,
        differing=differing,
        rows=tuple(versions),
        refused=tuple(refused),
        silent=tuple(silent),
        verdict=elsewhere if config.other_machine else judge.verdict(),
        within_rounding=not elsewhere.excesses,
    )


def _look_at(teacher: TeacherConfig, spec: RunSpec, tokens: RunSpec) -> dict[str, tuple[Any, Any]]:
    """What run.json says of the teacher and what is true of the live one, where they differ; checks that it fits."""
    model_config = load_config(teacher)
    check_fits(teacher, model_config, tokens)
    for member, _ in members(teacher):
        check_fits(member, load_config(member), tokens)
    live = describe(teacher, model_config, dtype=computing_dtype(teacher, model_config))
    told = spec.teacher or {}
    return {key: (told.get(key), live.get(key)) for key in sorted({*told, *live}) if told.get(key) != live.get(key)}


def _load(store: StoreReader, made: DumpConfig | ScoreConfig, teacher: TeacherConfig) -> LiveTeacher:
    from potstill.teacher_dump.dumping import DumpJob
    from potstill.teacher_dump.engines.loading import load_engine
    from potstill.teacher_dump.scoring import ScoreJob

    job: Job
    if isinstance(made, DumpConfig):
        job = DumpJob(made.model_copy(update={"teacher": teacher}))
    else:
        job = ScoreJob(made.model_copy(update={"model": teacher}))
    engine = load_engine(teacher, job.wanted(store.spec.vocab_size), row_length=store.spec.row_length)
    return LiveTeacher(store, teacher, job, engine)


@dataclass(frozen=True)
class Versions:
    """A row in all its versions; refused: why a live run gives no targets of it, or None."""

    tokens: TokensRow
    stored: Row
    live: Row
    again: Row
    exact: Row
    refused: str | None

    @property
    def says_nothing(self) -> bool:
        """Whether the store holds no target of the row: refused when it was dumped, or without any to predict."""
        return not _num_targets(self.stored)

    def distances(self) -> RowDistances:
        """How far the versions are apart."""
        return row_distances(self.tokens, stored=self.stored, live=self.live, again=self.again, exact=self.exact)


def _num_targets(row: Row) -> int:
    targets = getattr(row, "targets", None)
    if targets is not None:
        return int(targets.num_entries)
    assert not isinstance(row, TokensRow)
    return int(np.count_nonzero(row.label_logprob) + np.count_nonzero(row.entropy))  # type: ignore[union-attr]


@dataclass(frozen=True)
class LiveTeacher:
    """A loaded teacher that runs rows as the dump of the store would."""

    store: StoreReader
    teacher: TeacherConfig
    job: Job
    engine: TeacherEngine

    def versions(
        self, tokens: Sequence[TokensRow], stored: Sequence[Row], *, seed: int, count: Callable[[int], None]
    ) -> Iterator[Versions]:
        """Every row as it is stored, and of two live runs: in order, and in other company."""
        batch_rows = self.teacher.batch_rows
        live = self._run(tokens, batch_rows, count)
        # Alone, or in pairs where they were alone, and in another order: what the engine makes of batches.
        shuffled = [tokens[i] for i in np.random.default_rng(seed).permutation(len(tokens))]
        again = self._run(shuffled, 1 if batch_rows > 1 else 2, count)
        for row, there in zip(tokens, stored, strict=True):
            (exact, first), (_, second) = live[row.row], again[row.row]
            on_grid = self._as_stored([exact, again[row.row][0]])
            yield Versions(row, there, on_grid[0], on_grid[1], exact, first or second)

    def _run(
        self, rows: Sequence[TokensRow], batch_rows: int, count: Callable[[int], None]
    ) -> dict[int, tuple[Row, str | None]]:
        """Each row as the engine gives it, and why it is refused, by its number."""
        found: dict[int, tuple[Row, str | None]] = {}
        for start in range(0, len(rows), batch_rows):
            batch = self._layout(rows[start : start + batch_rows])
            result = self.job.compute(self.engine, batch, self.store.spec.vocab_size)
            for row, refused in result.rows().rows:
                found[row.row] = row, None if refused is None else refused.reason
            count(len(batch.rows))
        return found

    def _layout(self, rows: Sequence[TokensRow]) -> TeacherBatch:
        if self.teacher.documents != "packed":
            return apart_batch(rows)
        return packed_batch(rows, length=self.store.spec.row_length, fixed=self.teacher.compile)

    def _as_stored(self, rows: Sequence[Row]) -> list[Row]:
        """What a reader of the store would find of these rows, in the columns that the teacher gives."""
        return self.store.as_stored(rows, spec=replace(self.store.spec, columns=()))
