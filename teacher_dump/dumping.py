"""dump: a teacher over a tokens store -> a targets store. One worker; any number may run on the same store."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from potstill.kernels.topk import TopK
from potstill.storage import RunSpec, StoreReader
from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.config import DumpConfig
from potstill.teacher_dump.engines import TeacherEngine
from potstill.teacher_dump.on_device import TopKOnItsWay, batch_topk
from potstill.teacher_dump.pipeline import BatchRows
from potstill.teacher_dump.selection import SELECTIONS, TARGET_STATS, HostTargets, cut_rows, selection_spec
from potstill.teacher_dump.worker import Job, WorkerSummary, run_worker


def dump(config: DumpConfig, worker: int | None = None, num_workers: int | None = None) -> WorkerSummary:
    """Do this worker's share of the units that are missing; see `run_worker` for errors and the end of a run."""
    return run_worker(config, config.teacher, _DumpJob(config), worker=worker, num_workers=num_workers)


@dataclass(frozen=True)
class _DumpJob(Job):
    config: DumpConfig
    word = "dump"

    def spec(self, tokens: StoreReader, teacher: dict[str, object]) -> RunSpec:
        return RunSpec(
            kind="targets",
            row_length=tokens.spec.row_length,
            rows_per_unit=tokens.spec.rows_per_unit,
            num_rows=tokens.num_rows,
            vocab_size=tokens.spec.vocab_size,
            tokenizer_digest=tokens.spec.tokenizer_digest,
            input_digest=tokens.digest,
            selection=selection_spec(self.config.selection),
            temperatures=tuple(self.config.temperatures),
            stats=TARGET_STATS,
            teacher=teacher,
        )

    def compute(self, engine: TeacherEngine, batch: TeacherBatch, vocab_size: int) -> _DumpResult:
        topk = batch_topk(
            engine,
            batch,
            k=self.config.selection.k,
            vocab_size=vocab_size,
            temperatures=self.config.temperatures,
            chunk_bytes=self.config.teacher.chunk_bytes,
        )
        return _DumpResult(self.config, topk, batch, vocab_size)


@dataclass(frozen=True)
class _DumpResult:
    config: DumpConfig
    topk: TopKOnItsWay
    batch: TeacherBatch
    vocab_size: int

    def rows(self) -> BatchRows:
        topk = self.topk.wait()
        found = host_targets(topk, self.config)
        rows = list(cut_rows(found, self.batch.rows, vocab_size=self.vocab_size))
        excluded = np.nan_to_num(found.excluded_mass.astype(np.float64))
        return BatchRows(rows, {"excluded_mass": float(excluded.sum()), "positions": float(len(excluded))})


def host_targets(topk: TopK, config: DumpConfig) -> HostTargets:
    """Select entries from a top-k on the host, as arrays."""
    # On the host: cutting to the kept entries has a result of unknown size, which would stop a GPU's queue.
    kept = SELECTIONS[config.selection.mode](topk, config.selection)
    assert kept.logprobs is not None
    return HostTargets(
        offsets=_array(kept.offsets),
        ids=_array(kept.ids),
        logprobs=_array(kept.logprobs),
        log_tail=_array(kept.log_tail),
        log_tail_at={t: _array(v) for t, v in kept.log_tail_at.items()},
        entropy=_array(topk.entropy),
        label_logprob=_array(topk.label_logprob),
        label_rank=_array(topk.label_rank),
        excluded_mass=_array(topk.excluded_mass),
        lse=_array(topk.lse),
    )


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.numpy()
    return array
