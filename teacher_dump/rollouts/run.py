"""rollout: K sampled answers and a greedy one to each prompt of a tokens store, graded, counted and kept.

OUTPUT/scores    what `score` gives, and per document `pass_rate` and `greedy_score` (their means as row statistics)
OUTPUT/answers   the kept answers by row of the input: written unit by unit beside the scores
OUTPUT/tokens    the same packed as whole documents, the prompt masked off: made at the end by a single worker

PACED (arXiv 2603.11178) weighs problems by the pass rate over K samples of the student; POCL (arXiv 2506.05695) orders
them by ROUGE-L of its greedy answer, fused with its loss on the reference, which is in the same store.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from potstill.common.answer_text import decoder
from potstill.common.errors import UserError
from potstill.storage import StoreReader
from potstill.teacher_dump.identity import load_config
from potstill.teacher_dump.job import WorkerSummary
from potstill.teacher_dump.prepared import StoreSummary
from potstill.teacher_dump.rollouts.config import RolloutConfig, store_places
from potstill.teacher_dump.rollouts.job import RolloutJob
from potstill.teacher_dump.rollouts.kept import pack_kept
from potstill.teacher_dump.rollouts.questions import Survey, all_rows, questions_of, survey
from potstill.teacher_dump.rollouts.texts import Judge, as_numbers, find_stop_ids, find_tokenizer
from potstill.teacher_dump.work import open_rows
from potstill.teacher_dump.worker import run_worker

log = logging.getLogger(__name__)
_ROWS_AT_ONCE = 256
_BINS = ("0", "to 1/4", "to 1/2", "to 3/4", "below 1", "1")


@dataclass(frozen=True)
class RolloutSummary:
    """What a worker did; pass rates and kept answers where the stores are complete. lines: for a person."""

    worker: WorkerSummary
    kept: StoreSummary | None
    lines: tuple[str, ...]

    @property
    def num_missing(self) -> int:
        return self.worker.num_missing

    @property
    def num_workers(self) -> int:
        return self.worker.num_workers

    @property
    def sealed(self) -> bool:
        return self.worker.sealed

    def format(self) -> str:
        """A few lines for a person."""
        kept = [] if self.kept is None else self.kept.format()
        return "\n".join([self.worker.format(), *self.lines, *kept])


def rollout(config: RolloutConfig, worker: int | None = None, num_workers: int | None = None) -> RolloutSummary:
    """Do this worker's share of the units that are missing; the last, single worker seals and packs.

    Raises UserError, StoppedError after a signal (nothing committed is lost), StoreError for trouble with the stores.
    Running it again continues; the stores are then equal to the bit to those of one go.
    """
    reader = open_rows(config)
    found = find_tokenizer(config, reader)
    name, tokenizer = found or (None, None)
    stop_ids = find_stop_ids(config, reader, tokenizer, load_config(config.model))
    asks = survey(reader, stop_ids)
    judge = Judge(
        as_numbers if tokenizer is None else decoder(tokenizer),
        config.grader.make(),
        stop_ids,
    )
    _try_grader(judge, reader, stop_ids)
    places = store_places(config)
    job = RolloutJob(config, judge, asks, places["answers"], places["tokens"])
    _say(job, asks, stop_ids)
    scores = config.model_copy(update={"output": places["scores"]})
    summary = run_worker(scores, config.model, job, worker=worker, num_workers=num_workers)
    if not summary.sealed:
        seals = "" if config.seal else ", with seal"
        again = f"when no unit is missing, run the same command once more as a single worker{seals}: it seals and packs"
        return RolloutSummary(summary, None, (again,) if summary.num_workers > 1 or not config.seal else ())
    lines = _figures(StoreReader(places["scores"]), config)
    if config.keep == "none":
        return RolloutSummary(summary, None, tuple(lines))
    kept = pack_kept(config, answers=places["answers"], output=places["tokens"], tokenizer=name)
    if kept is None:
        lines.append(f"no answer was kept (keep: {config.keep}), so there is no store {places['tokens']}")
    return RolloutSummary(summary, kept, tuple(lines))


def _try_grader(judge: Judge, reader: StoreReader, stop_ids: frozenset[int]) -> None:
    """Grade a reference against itself: a grader that cannot is told of in seconds, not after the first unit."""
    for row in all_rows(reader):
        for question in questions_of(row, stop_ids, store=reader.url):
            if question is None:
                continue
            grade = judge.grade(question, question.reference)
            if grade < 1.0:
                log.warning("the grader gives a reference %.3g against itself (row %d); look at it", grade, row.row)
            return


def _say(job: RolloutJob, asks: Survey, stop_ids: frozenset[int]) -> None:
    config = job.config
    left_out = asks.num_documents - asks.num_questions
    log.info(
        "rollout: %d prompts%s, %d answers each of %d tokens at most (the longest reference has %d), ended by %s, "
        "graded by %s from %g on",
        asks.num_questions,
        f" ({left_out} documents train on nothing and are left out)" if left_out else "",
        len(config.numbers),
        job.max_new_tokens,
        asks.longest,
        f"ids {sorted(stop_ids)[:8]}" if stop_ids else "the length of their reference, as no end mark is known",
        config.grader.kind,
        config.grader.passing,
    )


def _figures(scores: StoreReader, config: RolloutConfig) -> list[str]:
    """Pass rates and grades of the whole store, in words."""
    if not scores.num_rows:
        raise UserError(f"{scores.url} holds no rows")
    columns = {name: _column(scores, name) for name in config.columns}
    lines = []
    if "pass_rate" in columns:
        rates = columns["pass_rate"]
        # 0 | (0, 1/4] | (1/4, 1/2] | (1/2, 3/4] | (3/4, 1) | 1
        places = np.where(rates == 0, 0, np.where(rates == 1, 5, np.clip(np.ceil(rates * 4), 1, 4))).astype(int)
        counts = np.bincount(places, minlength=len(_BINS))
        told = ", ".join(f"{name}: {count}" for name, count in zip(_BINS, counts.tolist(), strict=True))
        lines.append(f"pass rate of {len(rates)} prompts: mean {rates.mean():.4g}; {told}")
    if "greedy_score" in columns:
        grades = columns["greedy_score"]
        passed = float((grades >= np.float32(config.grader.passing)).mean())
        lines.append(f"grade of the greedy answer: mean {grades.mean():.4g}; {passed:.1%} passed")
    return lines


def _column(scores: StoreReader, name: str) -> np.ndarray:
    """A column per document over the whole store, float32, documents without a figure left out."""
    parts = []
    for first in range(0, scores.num_rows, _ROWS_AT_ONCE):
        rows = scores.scores_rows(range(first, min(first + _ROWS_AT_ONCE, scores.num_rows)))
        parts += [row.more[name] for row in rows]
    values: np.ndarray = np.concatenate(parts)
    return values[~np.isnan(values)]
