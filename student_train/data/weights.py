"""Weights of rows and documents, from the figures that a store has of them (the forms: config/weights.py).

Every weight is a function of its row and of the store alone, so that it does not depend on the micro-batch or the
number of ranks; the division by their mean over the global batch comes later, on the device.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from potstill.common.errors import UserError
from potstill.storage import ScoresRow, StoreReader, TargetsRow, TokensRow, shared_from, shared_note
from potstill.student_train.config.weights import DOCUMENT_COLUMNS, PROBABILITY, Weights
from potstill.student_train.curriculum.live_scores import LiveRow

log = logging.getLogger(__name__)
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Figures = TargetsRow | ScoresRow | LiveRow


def token_factors(
    weights: Weights, rows: Sequence[TokensRow], figures: Sequence[Figures | None], key: str = "weights"
) -> Float32:
    """What each token of these rows counts, float32 [N], row after row; not divided by a mean.

    A row or a document of which the store says nothing (its teacher was refused) counts 0. Raises UserError with `key`.
    """
    of = _row_factors if weights.of == "row" else _document_factors
    found = []
    for row, own in zip(rows, figures, strict=True):
        if own is None:
            raise UserError(
                f"{key}.store: row {row.row} is of a source without a store {weights.store!r}; name that store in each "
                "source, or take a stage without weights"
            )
        try:
            found.append(of(weights, row, own) if _is_known(own) else np.zeros(len(row.tokens), np.float32))
        except ValueError as error:
            raise UserError(f"{key}.column: row {row.row} of {weights.store!r}: {weights.column} {error}") from error
    return np.concatenate(found)


def check_weights(weights: Weights, store: StoreReader, *, key: str, of: str = "") -> None:
    """See that the store has the column, and that each row's statistic makes a weight. Raises UserError naming the key.

    Statistics of rows are looked at whole, in the index; the columns that documents are weighed by in the first row.
    `of` says whose store it is, behind its name.
    """
    name = f"{weights.store!r}{of}"
    if weights.of == "document":
        _check_document_column(weights.column, store, key=key, name=name)
        return
    stats = store.row_stats
    needed = "mean_loss" if weights.column == PROBABILITY else weights.column
    if needed not in stats:
        raise UserError(
            f"{key}.column: store {name} has no row statistic {needed!r}; it has {sorted(stats)}. Score "
            "again with that statistic, or name one of these"
        )
    what = {
        "what": "row_weights",
        "version": 1,
        "index": store.index_digest,
        "weights": weights.model_dump(mode="json"),
        "key": key,
        "name": name,
    }
    node = shared_from(store.shared_by, 4 * store.num_rows)
    found = shared_note(node, what, lambda: _weigh_rows(weights, stats, needed, key=key, name=name))
    if found["unknown"]:
        text = "%s: %d of %d rows of store %s have no targets; they count 0"
        log.warning(text, key, found["unknown"], found["rows"], name)


def _weigh_rows(weights: Weights, stats: Mapping[str, Float32], needed: str, *, key: str, name: str) -> dict[str, int]:
    """Rows, and those without targets. Raises UserError where the figures make no weights."""
    values = np.asarray(stats[needed], np.float64)
    known = np.asarray(stats["num_targets"]) > 0 if "num_targets" in stats else np.ones(len(values), bool)
    try:
        found = weights.weigh(np.exp(-values[known]) if weights.column == PROBABILITY else values[known])
    except ValueError as error:
        raise UserError(f"{key}.column: {weights.column} of store {name} {error} (of its known rows)") from None
    if not found.any():
        raise UserError(
            f"{key}: every row of store {name} weighs 0, so there is nothing to train on; take another "
            "form, or another column"
        )
    return {"rows": len(known), "unknown": len(known) - int(known.sum())}


def _check_document_column(column: str, store: StoreReader, *, key: str, name: str) -> None:
    first = store.row(0)
    assert isinstance(first, TargetsRow | ScoresRow)
    of = DOCUMENT_COLUMNS[column].of
    if of is None and column not in _per_document(first):
        raise UserError(
            f"{key}.column: store {name} holds no {column} of documents; name a store of rollouts that were graded "
            "(potstill rollout), or a column that any scores give: exact, answer_probability, probability, ..."
        )
    if of is not None and _column(first, of) is None:
        raise UserError(
            f"{key}.column: {column} of a document needs the {of} of its labels, which store {name} does not hold; "
            "dump or score it with that column"
        )


def _is_known(figures: Figures) -> bool:
    """Whether the store says anything of the row. Where a teacher was refused, all statistics are 0."""
    return figures.stats.get("num_targets", 1.0) > 0


def _row_factors(weights: Weights, row: TokensRow, figures: Figures) -> Float32:
    stats = figures.stats
    value = math.exp(-stats["mean_loss"]) if weights.column == PROBABILITY else stats[weights.column]
    return np.full(len(row.tokens), weights.weigh(np.array([value]))[0], np.float32)


def _document_factors(weights: Weights, row: TokensRow, figures: Figures) -> Float32:
    """The weight of its document at each token [n]; documents without a trained position count 0."""
    entry = DOCUMENT_COLUMNS[weights.column]
    counts, total = _sums(row, figures, entry.of)
    known = counts > 0
    if entry.of is None:
        values = np.asarray(_per_document(figures)[weights.column], np.float64)
        known &= ~np.isnan(values)
        values = values[known]
    else:
        values = entry.fold(total[known], counts[known])
    found = np.zeros(len(row.doc_lens), np.float64)
    found[known] = weights.weigh(values)
    return np.repeat(found.astype(np.float32), row.doc_lens)


def _sums(row: TokensRow, figures: Figures, of: str | None) -> tuple[Float64, Float64]:
    """Trained positions of each document [d], and the sum over them of a column of the labels (0 without one) [d]."""
    if isinstance(figures, LiveRow):
        count = figures.count.astype(np.float64)
        return count, np.zeros_like(count) if of is None else figures.sums[of].astype(np.float64)
    trained = row.has_target()
    if isinstance(figures, TargetsRow):
        trained = trained & (np.diff(figures.targets.offsets) > 0)  # the store says nothing of the others
    num_documents = len(row.doc_lens)
    document = np.repeat(np.arange(num_documents), row.doc_lens)[trained]
    values = np.zeros(len(document))
    if of is not None:
        column = _column(figures, of)
        assert column is not None
        values = np.asarray(column[trained] == 0 if of == "rank" else column[trained], np.float64)
    count = np.bincount(document, minlength=num_documents).astype(np.float64)
    return count, np.bincount(document, values, minlength=num_documents).astype(np.float64)


def _per_document(figures: Figures) -> Mapping[str, NDArray[np.generic]]:
    """The figures that a store keeps of a row's documents, each [d], NaN for a document that it says nothing of."""
    return getattr(figures, "more", {})


def _column(figures: TargetsRow | ScoresRow, name: str) -> Float64 | None:
    """loss, rank or entropy of a row's labels [n] float64, or None where the store does not hold it."""
    side = figures.targets if isinstance(figures, TargetsRow) else figures
    values = getattr(side, {"loss": "label_logprob", "rank": "label_rank", "entropy": "entropy"}[name])
    if values is None:
        return None
    return np.asarray(-values if name == "loss" else values, np.float64)
