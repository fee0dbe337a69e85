"""Which rows are run, and which tokens store a store was made of."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from potstill.common.errors import UserError
from potstill.storage import HELD, StoreError, StoreReader

log = logging.getLogger(__name__)

_MOST_BESIDE = 64  # folders beside a store that are looked at


def open_tokens(store: StoreReader, tokens: str | None) -> StoreReader:
    """The tokens store that `store` was made of: the one named, or one beside it. Raises UserError, StoreError."""
    wanted = store.spec.input_digest
    if tokens is None:
        return _beside(store)
    found = StoreReader(tokens)
    if found.spec.kind != "tokens" or found.digest != wanted:
        raise UserError(
            f"{tokens} is a store of {found.spec.kind} with digest {found.digest[:16]}, and {store.url} was made of "
            f"the tokens store with digest {str(wanted)[:16]}; name that one with --tokens"
        )
    return found


def _beside(store: StoreReader) -> StoreReader:
    place = Path(store.url)
    folders = sorted(place.resolve().parent.iterdir())[:_MOST_BESIDE] if place.is_dir() else []
    for folder in folders:
        if not (folder / "manifest.json").is_file():
            continue
        try:
            found = StoreReader(folder)
        except StoreError as error:
            log.info("%s is not looked at for the tokens: %s", folder, error)
            continue
        if found.spec.kind == "tokens" and found.digest == store.spec.input_digest:
            log.info("the tokens are those of %s", folder)
            return found
    raise UserError(
        f"{store.url} was made of the tokens store with digest {str(store.spec.input_digest)[:16]}, and none of that "
        "digest stands beside it; name it with --tokens"
    )


def sampled_rows(store: StoreReader, count: int, *, seed: int) -> NDArray[np.int64]:
    """Rows of the store spread evenly, one of each of `count` parts of equal size, chosen by the seed; ascending.

    All where there are no more. Rows that a dump has left out do not count. Raises UserError where there are none.
    """
    every = np.arange(store.num_rows, dtype=np.int64)
    if store.spec.only_rows is not None:
        every = every[np.asarray(store.row_stats[HELD])[every] > 0]
    if not len(every):
        raise UserError(f"{store.url} holds no committed row yet; run this command again when there is one")
    if len(every) <= count:
        return every
    bounds = np.arange(count + 1, dtype=np.int64) * len(every) // count
    return every[np.random.default_rng(seed).integers(bounds[:-1], bounds[1:])]
