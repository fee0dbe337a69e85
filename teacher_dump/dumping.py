"""dump: a teacher over a tokens store -> a targets store. One worker; any number may run on the same store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from potstill.kernels.topk import Sampled, TopK
from potstill.kernels.types import SparseTargetTensors
from potstill.storage import (
    COLUMNS,
    HELD,
    KBound,
    RunSpec,
    SparseTargets,
    StoreReader,
    bound_positions,
    held_mask,
    only_rows_field,
)
from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.config import DumpConfig, SelectionConfig
from potstill.teacher_dump.engines.base import TeacherEngine, TopKWanted, TopLogprobs
from potstill.teacher_dump.engines.table import ENGINES
from potstill.teacher_dump.engines.top_logprobs import as_topk
from potstill.teacher_dump.id_frequencies import id_frequencies
from potstill.teacher_dump.job import Job, WorkerSummary
from potstill.teacher_dump.left_out import LeftOut, RowsOf
from potstill.teacher_dump.on_device import batch_best, batch_sample
from potstill.teacher_dump.pipeline import BatchRows
from potstill.teacher_dump.selection import PREFIXES, HostBatch, cut_rows, selection_spec, target_stats
from potstill.teacher_dump.series import SeriesSummary, dump_series
from potstill.teacher_dump.worker import run_worker

# Does the whole of one dump, over all rows (None) or those given.
Runner = Callable[[DumpConfig, "NDArray[np.int64] | None"], WorkerSummary]
SIDE_COLUMNS = ("entropy", "label_logprob", "label_rank")  # of the teacher's whole distribution, beside the entries
NO_ENTROPY = "the entropy over the vocabulary"  # in `info.lost` of a store without it


def dump(
    config: DumpConfig,
    worker: int | None = None,
    num_workers: int | None = None,
    *,
    only_rows: RowsOf | None = None,
    runner: Runner | None = None,
) -> WorkerSummary | SeriesSummary:
    """Do this worker's share of the units that are missing, of each checkpoint in turn if there are several.

    `only_rows` gives the rows that each of them is run over; the others take their places in the store without targets
    (storage/rows/only_rows.py). `runner` does the work instead of this process, e.g. on a cluster. See `run_worker` for
    errors and the end of a run.
    """

    def run(member: DumpConfig) -> WorkerSummary:
        rows = None if only_rows is None else only_rows(member)
        if runner is not None:
            return runner(member, rows)
        job = DumpJob(member, rows)
        return run_worker(member, member.teacher, job, worker=worker, num_workers=num_workers)

    return dump_series(config, run) if config.teacher.checkpoints else run(config)


@dataclass(frozen=True)
class DumpJob(Job):
    """What `dump` does with a batch."""

    config: DumpConfig
    rows: NDArray[np.int64] | None = None  # that the teacher is run over; None: all
    word = "dump"

    def spec(self, tokens: StoreReader, teacher: dict[str, object]) -> RunSpec:
        selection = self.config.selection
        mask = None if self.rows is None else held_mask(self.rows, tokens.num_rows)
        stats = target_stats(entropy=self.config.entropy)
        info: dict[str, Any] = {"seed": selection.seed} if selection.mode == "sample" else {}
        return RunSpec(
            kind="targets",
            row_length=tokens.spec.row_length,
            rows_per_unit=tokens.spec.rows_per_unit,
            num_rows=tokens.num_rows,
            vocab_size=tokens.spec.vocab_size,
            tokenizer_digest=tokens.spec.tokenizer_digest,
            input_digest=tokens.digest,
            selection=selection_spec(selection),
            temperatures=tuple(self.config.temperatures),
            stats=stats if mask is None else (*stats, HELD),
            only_rows=None if mask is None else only_rows_field(mask),
            teacher=teacher,
            info=info if self.config.entropy else {**info, "lost": [NO_ENTROPY]},
        )

    def left_out(self, spec: RunSpec) -> LeftOut | None:
        if self.rows is None:
            return None
        assert spec.num_rows is not None
        return LeftOut(held_mask(self.rows, spec.num_rows), spec)

    def id_frequencies(self, tokens: StoreReader) -> NDArray[np.int64] | None:
        return id_frequencies(tokens) if self.config.frequency_ids else None

    def wanted(self, vocab_size: int) -> TopKWanted | None:
        selection, temperatures = self.config.selection, tuple(self.config.temperatures)
        if selection.mode == "sample":
            return None
        return TopKWanted(k=min(selection.k, vocab_size), vocab_size=vocab_size, temperatures=temperatures)

    def compute(self, engine: TeacherEngine, batch: TeacherBatch, vocab_size: int) -> DumpResult:
        selection, chunk_bytes = self.config.selection, self.config.teacher.chunk_bytes
        kept: dict[str, Any] = {
            "selection": selection,
            "marks_held": self.rows is not None,
            "entropy": self.config.entropy,
        }
        if selection.mode == "sample":
            drawn = batch_sample(
                engine,
                batch,
                num_draws=selection.num_draws,
                power=selection.power,
                seed=selection.seed,
                vocab_size=vocab_size,
                chunk_bytes=chunk_bytes,
            )
            return DumpResult(batch, vocab_size, lambda: host_draws(drawn.wait()), **kept)
        best = batch_best(
            engine,
            batch,
            k=selection.k,
            vocab_size=vocab_size,
            temperatures=self.config.temperatures,
            chunk_bytes=chunk_bytes,
        )
        return DumpResult(batch, vocab_size, lambda: host_prefix(best.wait(), self.config), **kept)

    def k_bound(self, figures: Mapping[str, float]) -> KBound | None:
        selection, positions = self.config.selection, figures.get("positions", 0.0)
        if selection.mode != "top_p_k" or not positions:
            return None
        share, kept = (figures[name] / positions for name in ("k_bound", "kept_mass"))
        can_draw = not ENGINES[self.config.teacher.engine].gives_top_k
        return KBound(selection.k, selection.p, share, kept, can_draw)


@dataclass(frozen=True)
class DumpResult:
    """A batch whose figures are on their way to the host."""

    batch: TeacherBatch
    vocab_size: int
    wait: Callable[[], HostBatch]
    selection: SelectionConfig
    marks_held: bool = False  # whether rows say that they are held, because others are left out
    entropy: bool = True  # whether rows keep it

    def rows(self) -> BatchRows:
        """Wait for the copy, select entries and cut into rows of the store."""
        found = self.wait()
        rows = list(cut_rows(found, self.batch.rows, entropy=self.entropy))
        if self.marks_held:
            rows = [(replace(row, stats={**row.stats, HELD: 1.0}), refused) for row, refused in rows]
        excluded = np.nan_to_num(found.excluded_mass.astype(np.float64))
        figures = {"excluded_mass": float(excluded.sum()), "positions": float(len(excluded))}
        return BatchRows(rows, figures, self._shown(found))

    def _shown(self, found: HostBatch) -> dict[str, float]:
        if self.selection.mode != "top_p_k":
            return {}
        counts = np.diff(found.targets.offsets)
        num_bound, kept = bound_positions(counts, found.targets.log_tail, k=self.selection.k, p=self.selection.p)
        return {"k_bound": float(num_bound), "kept_mass": kept}


def host_prefix(found: TopK | TopLogprobs, config: DumpConfig) -> HostBatch:
    """Select a prefix of each token's top-k, on the host."""
    # On the host: cutting to the kept entries has a result of unknown size, which would stop a GPU's queue.
    topk = found if isinstance(found, TopK) else as_topk(found)
    return host_batch(PREFIXES[config.selection.mode](topk, config.selection), found)


def host_draws(sampled: Sampled) -> HostBatch:
    """Draws on the host, as arrays."""
    return host_batch(sampled.targets, sampled)


def host_batch(kept: SparseTargetTensors, found: TopK | Sampled | TopLogprobs) -> HostBatch:
    """The entries kept of a batch and the columns beside them, as arrays of the types that a store has."""
    side = [name for name in SIDE_COLUMNS if name != "entropy" or not isinstance(found, TopLogprobs)]
    columns: dict[str, Any] = dict(kept.columns) | {name: getattr(found, name) for name in side}
    arrays = {
        name: {t: _array(value, name) for t, value in values.items()}
        if isinstance(values, Mapping)
        else _array(values, name)
        for name, values in columns.items()
    }
    targets = SparseTargets(offsets=kept.offsets.numpy(), columns=arrays, num_draws=kept.num_draws)
    lse = None if isinstance(found, TopLogprobs) else found.lse.numpy()
    return HostBatch(targets=targets, excluded_mass=found.excluded_mass.numpy(), lse=lse)


def _array(tensor: Tensor, name: str) -> np.ndarray:
    array: np.ndarray = tensor.numpy().astype(COLUMNS[name].dtype, copy=False)
    return array
