"""score: a small language model over a tokens store -> a scores store. The same walk as `dump`, without entries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from potstill.kernels.topk import TopK
from potstill.storage import RunSpec, ScoresRow, StoreReader, token_digest
from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.config import ScoreConfig
from potstill.teacher_dump.engines.base import TeacherEngine, TopKWanted
from potstill.teacher_dump.job import Job, WorkerSummary
from potstill.teacher_dump.on_device import OnItsWay, batch_topk
from potstill.teacher_dump.pipeline import BatchRows, HostResult
from potstill.teacher_dump.row_scores import SCORE_STATS, row_scores
from potstill.teacher_dump.selection import NO_RANK, Refused, refusal
from potstill.teacher_dump.worker import run_worker


def score(config: ScoreConfig, worker: int | None = None, num_workers: int | None = None) -> WorkerSummary:
    """Do this worker's share of the units that are missing; see `run_worker` for errors and the end of a run."""
    return run_worker(config, config.model, ScoreJob(config), worker=worker, num_workers=num_workers)


@dataclass(frozen=True)
class ScoreJob(Job):
    """The model's own figures of the labels. `rollout` adds its answers to them."""

    config: ScoreConfig
    word = "score"

    def spec(self, tokens: StoreReader, teacher: dict[str, object]) -> RunSpec:
        return RunSpec(
            kind="scores",
            row_length=tokens.spec.row_length,
            rows_per_unit=tokens.spec.rows_per_unit,
            num_rows=tokens.num_rows,
            vocab_size=tokens.spec.vocab_size,
            tokenizer_digest=tokens.spec.tokenizer_digest,
            input_digest=tokens.digest,
            stats=SCORE_STATS,
            teacher=teacher,
            info={"salt_rank": self.config.salt_rank},
        )

    def wanted(self, vocab_size: int) -> TopKWanted:
        return TopKWanted(k=1, vocab_size=vocab_size, temperatures=())

    def compute(self, engine: TeacherEngine, batch: TeacherBatch, vocab_size: int) -> HostResult:
        topk = batch_topk(
            engine, batch, k=1, vocab_size=vocab_size, temperatures=(), chunk_bytes=self.config.model.chunk_bytes
        )
        return ScoreResult(self.config, topk, batch)


@dataclass(frozen=True)
class ScoreResult:
    """Figures of a batch on their way to the host."""

    config: ScoreConfig
    topk: OnItsWay[TopK]
    batch: TeacherBatch

    def rows(self) -> BatchRows:
        """Wait for the copy, and cut it into rows of the store."""
        return BatchRows(list(_score_rows(self.topk.wait(), self.batch, salt_rank=self.config.salt_rank)))


def _score_rows(topk: TopK, batch: TeacherBatch, *, salt_rank: int) -> Iterator[tuple[ScoresRow, Refused | None]]:
    logprob, entropy, lse = (value.numpy() for value in (topk.label_logprob, topk.entropy, topk.lse))
    rank = np.minimum(topk.label_rank.numpy(), NO_RANK)
    start = 0
    for row in batch.rows:
        mask = row.has_target()
        stop = start + int(mask.sum())
        here = slice(start, stop)
        reason = refusal(lse[here], entropy[here], mask)
        columns = (
            np.zeros(len(mask), np.float32),
            np.full(len(mask), NO_RANK, np.int32),
            np.zeros(len(mask), np.float32),
        )
        stats = dict.fromkeys(SCORE_STATS, 0.0)
        if reason is None:
            for column, values in zip(columns, (logprob[here], rank[here], entropy[here]), strict=True):
                column[mask] = values
            stats = row_scores(-logprob[here], rank[here], entropy[here], salt_rank=salt_rank)
        digest = token_digest(row.tokens, row.doc_lens)
        yield ScoresRow(row.row, digest, *columns, stats), None if reason is None else Refused(row.row, reason)
        start = stop
