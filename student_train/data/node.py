"""Where the ranks of a machine share what they read: the reader's options for a store, from data.cache_dir."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from potstill.storage import HELD, StoreReader, WriteFailedError, default_node_root
from potstill.student_train.config.train import DataConfig, TrainConfig
from potstill.student_train.config.weights import PROBABILITY

log = logging.getLogger(__name__)
_told: set[str] = set()


def reader_options(data: DataConfig, place: Path | str) -> dict[str, Any]:
    """Of every store its statistics of rows are shared, of one at a URL also its index.

    What is read of a URL is kept where a folder is named: one that was not asked for is not filled with it.
    """
    root = _root(data)
    if root is None:
        return {}
    options: dict[str, Any] = {"share_dir": root, "cache_bytes": int(data.cache_gib * 2**30)}
    keeps_rows = data.cache_dir != "auto" and not isinstance(place, Path)
    return {**options, "cache_dir": root} if keeps_rows else options


def _root(data: DataConfig) -> Path | None:
    """The folder; None where it is switched off, or the node has no place for one of our own (that is said once)."""
    if data.cache_dir is None or not data.cache_gib:
        return None
    if data.cache_dir != "auto":
        return data.cache_dir
    try:
        return default_node_root()
    except WriteFailedError as error:
        text = str(error)
        if text not in _told:
            _told.add(text)
            log.warning("data.cache_dir is auto: %s; until then each rank reads and holds statistics of its own", text)
        return None


def expect_statistics(config: TrainConfig, name: str, store: StoreReader) -> None:
    """Tell the store which statistics the run reads of it, so that they come in one pass over its index."""
    store.expect_stats(_statistics(config, name))


def _statistics(config: TrainConfig, name: str) -> Iterable[str]:
    found = {"num_targets", HELD}
    for stage in config.curriculum:
        if stage.rows is not None:
            found |= {reference.stat for reference in stage.rows.score.of if reference.store == name}
        if stage.weights is not None and stage.weights.of == "row" and stage.weights.store == name:
            found.add("mean_loss" if stage.weights.column == PROBABILITY else stage.weights.column)
    return found
