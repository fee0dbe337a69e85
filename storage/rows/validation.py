"""validate: every rule of targets, in the order in which the first one broken is reported."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from potstill.storage.errors import StoreError
from potstill.storage.rows.array_types import MAX_ENTRIES_PER_TOKEN, MAX_VOCAB_SIZE
from potstill.storage.rows.column import Column, Examined, TargetArrays, Values
from potstill.storage.rows.columns import COLUMNS, check_pairing


def validate(targets: TargetArrays, *, vocab_size: int, strict: bool) -> None:
    """Check structure and values of all columns; raises StoreError on the first rule broken.

    `strict` asks for what the encoder asks for, else for what may come out of a store.
    """
    num_entries = _check_structure(targets)
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise StoreError(f"vocab_size: found {vocab_size}, expected 1..{MAX_VOCAB_SIZE}")
    found = Examined(targets, vocab_size, strict)
    for column, values in _present(targets):
        if column.check is not None and (column.axis != "entry" or num_entries):
            for name, array in column.labelled(values):
                column.check(array, name, found)
        if isinstance(values, Mapping):
            for temperature in values:
                if not (0 < temperature < 1e6) or temperature == 1.0:
                    raise StoreError(f"{column.name}: temperature {temperature} must be positive and not 1")


def _present(targets: TargetArrays) -> list[tuple[Column, Values]]:
    return [(column, targets.columns[name]) for name, column in COLUMNS.items() if name in targets.columns]


def _check_structure(targets: TargetArrays) -> int:
    """Shapes, offsets and entries per token; the number of entries."""
    for name in ("ids", "log_tail"):
        if name not in targets.columns:
            raise StoreError(f"targets hold no {name}; give ids [entries] and log_tail [tokens]")
    offsets = targets.offsets
    num_entries, num_tokens = (len(targets.columns[name]) for name in ("ids", "log_tail"))
    if len(offsets) != num_tokens + 1:
        raise StoreError(f"offsets: found {len(offsets)} values for {num_tokens} tokens, expected {num_tokens + 1}")
    kept = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != num_entries or (num_tokens and int(kept.min()) < 0):
        raise StoreError(f"offsets: must rise from 0 to the {num_entries} entries, found {offsets[0]}..{offsets[-1]}")
    if num_tokens and int(kept.max()) > MAX_ENTRIES_PER_TOKEN:
        raise StoreError(f"token {int(kept.argmax())}: {int(kept.max())} entries, at most 255 can be stored; lower k")
    places = {"token": ("tokens", num_tokens), "entry": ("entries", num_entries)}
    for column, values in _present(targets):
        for name, array in column.labelled(values):
            word, number = places.setdefault(column.axis, ("rows", len(array)))
            if len(array) != number:
                raise StoreError(f"{name}: found {len(array)} values for {number} {word}")
    check_pairing(targets)
    return num_entries
