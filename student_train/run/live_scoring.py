"""Rows scored by the student in training: one forward over each, and sums over the trained positions of its documents.

Rows are cut into batches by their list alone, and whole batches are divided over the ranks: every batch has the same
shape and contents at any number of ranks, so that the scores are the same to the bit where the weights are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from potstill.common.errors import UserError
from potstill.storage import LoadedBatch, SourceRows, TokensRow
from potstill.student_train.config.rescoring import Rescoring
from potstill.student_train.config.weights import LARGEST_NATS
from potstill.student_train.curriculum.live_scores import SUMS, LiveScores
from potstill.student_train.data.batch import MicroBatch, collate
from potstill.student_train.evaluation.drawn_answers import AnswerDrawing
from potstill.student_train.evaluation.heldout import measuring_objective
from potstill.student_train.evaluation.together import Work, work_together
from potstill.student_train.model.probe import LabelFiguresRequest
from potstill.student_train.model.requests import RunsRequests
from potstill.student_train.run.engine import Topology, gather_objects

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class RowScorer:
    """Scores rows of a run's sources. answers: how the student's own are drawn, where they are measured too."""

    options: Rescoring
    rows: SourceRows
    row_length: int
    topology: Topology
    answers: AnswerDrawing | None = None
    fixed_length: bool = False  # of the micro-batches, for a compiled backbone

    def score(self, model: RunsRequests, rows: NDArray[np.int64], *, step: int) -> LiveScores:
        """Scores of these rows (ids over all sources, ascending), the same on all ranks (a collective call).

        Raises UserError on all ranks where a figure is not finite.
        """
        topology = self.topology
        mine = work_together(self._work(rows, step), model, device=topology.device, world_size=topology.world_size)
        shares = [mine] if topology.world_size == 1 else gather_objects(mine)
        parts = sorted((part for share in shares for part in share), key=lambda part: part.batch)
        more = [name for name in ("pass_rate",) if self.answers is not None]
        found = LiveScores(
            name=self.options.name,
            step=step,
            rows=rows,
            num_documents=_joined([part.num_documents for part in parts], np.int32),
            count=_joined([part.count for part in parts], np.int32),
            sums={name: _joined([part.sums[name] for part in parts], np.float32) for name in SUMS},
            more={name: _joined([part.more[name] for part in parts], np.float32) for name in more},
        )
        _check_finite(found)
        return found

    def _work(self, rows: NDArray[np.int64], step: int) -> Work[list[_Part]]:
        """This rank's batches, of all that there are."""
        size, found = self.options.batch_rows, []
        for number, first in enumerate(range(0, len(rows), size)):
            if number % self.topology.world_size != self.topology.rank:
                continue
            tokens, _ = self.rows.read(rows[first : first + size], frozenset())
            figures = yield LabelFiguresRequest(self._micro_batch(tokens).to(self.topology.device))
            part = _part(number, tokens, torch.stack(figures).double().cpu().numpy())
            if self.answers is not None:
                part.more["pass_rate"] = yield from self.answers.pass_rates(tokens, step=step)
            found.append(part)
        return found

    def _micro_batch(self, tokens: list[TokensRow]) -> MicroBatch:
        ids = np.array([row.row for row in tokens], np.int64)
        return collate(
            LoadedBatch(batch=0, rows=ids, tokens=tokens, joined={}),
            measuring_objective(with_targets=False),
            micro_batch_rows=len(tokens),
            row_length=self.row_length,
            fixed_length=self.fixed_length,
        )[0]


@dataclass(frozen=True)
class _Part:
    """What is known of the documents of batch number `batch`."""

    batch: int
    num_documents: NDArray[np.int32]
    count: NDArray[np.int32]
    sums: dict[str, Float32]
    more: dict[str, Float32]


def _part(number: int, rows: list[TokensRow], figures: NDArray[np.float64]) -> _Part:
    """Sums over the trained positions of each document, of figures [3, N] in the order of SUMS."""
    num_documents = np.array([len(row.doc_lens) for row in rows], np.int32)
    total = int(num_documents.sum())
    document = np.repeat(np.arange(total), np.concatenate([row.doc_lens for row in rows]))
    trained = np.concatenate([row.has_target() for row in rows])
    of, kept = document[trained], np.minimum(figures[:, trained], LARGEST_NATS)  # a store keeps no larger ones
    return _Part(
        batch=number,
        num_documents=num_documents,
        count=np.bincount(of, minlength=total).astype(np.int32),
        sums={
            name: np.bincount(of, values, minlength=total).astype(np.float32)
            for name, values in zip(SUMS, kept, strict=True)
        },
        more={},
    )


def _joined(parts: list[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _check_finite(scores: LiveScores) -> None:
    for name, values in scores.sums.items():
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            place = int(np.searchsorted(scores.bounds, bad[0], side="right")) - 1
            raise UserError(
                f"rescoring before step {scores.step}: the {name} of row {scores.rows[place]} is {values[bad[0]]} "
                f"({len(bad)} such documents); the student's weights are not finite: lower optimizer.lr, lengthen "
                "schedule.warmup, and start again from the last checkpoint"
            )
