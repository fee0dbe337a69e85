"""What tables and JSON lines share: which columns are read, and a record out of their values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.common.errors import UserError
from potstill.teacher_dump.importing.token_file import Ids, Reading, TokenRecord
from potstill.teacher_dump.records.base import BadRecord

IDS_COLUMNS = ("input_ids", "tokens", "token_ids", "ids", "inputs")
ATTENTION_COLUMN = "attention_mask"
LABELS_OFF = -100
# Columns of masks that others write, which are read when they are named.
_MASK_COLUMNS = ("labels", "loss_mask", "completion_mask", "assistant_masks")
_OTHER_BOUNDS = ("position_ids", "seq_lengths", "sequence_lengths", "cu_seqlens")


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; None: there is none."""

    ids: str
    mask: str | None
    attention: str | None

    @property
    def names(self) -> list[str]:
        return [name for name in (self.ids, self.mask, self.attention) if name is not None]

    def facts(self, reading: Reading) -> Mapping[str, Any]:
        """What run.json keeps of them."""
        kept = {name: value for name, value in vars(self).items() if value is not None}
        recorded = "records" if self.attention is None else self.attention
        bounds = {"end_token": "end_token", "none": "records"}.get(reading.bounds, recorded)
        return {"columns": kept, "bounds": bounds}

    def hints(self, found: Iterable[str]) -> tuple[str, ...]:
        """What a person should know of the columns that are there and not read."""
        unused = sorted(set(found) - set(self.names))
        masks = [name for name in unused if name in _MASK_COLUMNS]
        bounds = [name for name in unused if name in _OTHER_BOUNDS]
        hints = [
            f"column {name} is not used: every token is trained on; --mask-column {name} reads it" for name in masks
        ]
        hints += [
            f"column {name} is not used: bounds of documents come from {ATTENTION_COLUMN} only" for name in bounds
        ]
        return tuple(hints)


def choose_columns(found: Iterable[str], reading: Reading, *, where: str) -> Columns:
    """The columns to read of those that are there. Raises UserError, which names `where`, when one is missing."""
    names = list(found)
    ids = reading.ids_column or next((name for name in IDS_COLUMNS if name in names), None)
    if ids is None or ids not in names:
        wanted = f"no column {ids!r}" if ids is not None else f"none of the columns {', '.join(IDS_COLUMNS)}"
        raise UserError(f"{where}: {wanted}; found {sorted(names)}; name the one that holds the ids (--ids-column)")
    for name, option in ((reading.mask_column, "--mask-column"), (reading.attention_column, "--attention-column")):
        if name is not None and name not in names:
            raise UserError(f"{where}: no column {name!r}; found {sorted(names)}; name one of them ({option})")
    attention = reading.attention_column or (ATTENTION_COLUMN if ATTENTION_COLUMN in names else None)
    return Columns(ids, reading.mask_column, attention)


def make_record(
    number: int,
    position: int,
    columns: Columns,
    reading: Reading,
    *,
    ids: Ids | BadRecord,
    flags: Ids | BadRecord | None = None,
    attention: Ids | BadRecord | None = None,
) -> TokenRecord:
    """A record out of the values of its columns, each [n]: padding left out, the mask read, cut into documents."""
    if isinstance(ids, BadRecord):
        return TokenRecord(number, BadRecord(f"column {columns.ids!r} {ids}"), position)
    if isinstance(flags, BadRecord):
        return TokenRecord(number, BadRecord(f"column {columns.mask!r} {flags}"), position)
    if isinstance(attention, BadRecord):
        return TokenRecord(number, BadRecord(f"column {columns.attention!r} {attention}"), position)
    others: list[tuple[str | None, Ids | None]] = [(columns.mask, flags), (columns.attention, attention)]
    for name, values in others:
        if values is not None and len(values) != len(ids):
            reason = f"column {name!r} has {len(values)} values, {columns.ids!r} {len(ids)}"
            return TokenRecord(number, BadRecord(reason), position)
    mask = None if flags is None else _mask(flags, ids, str(columns.mask))
    if isinstance(mask, BadRecord):
        return TokenRecord(number, mask, position)
    text: Ids = ids
    cuts = np.zeros(len(ids), np.bool_)  # whether a document begins here
    if attention is not None:
        kept = attention != 0
        if reading.bounds in ("auto", "recorded"):
            cuts[1:] = attention[1:] != attention[:-1]
        # A gap of padding parts documents: its change of value falls to the first token that is kept after it.
        parts = np.cumsum(cuts)[kept]
        text, mask = ids[kept], None if mask is None else mask[kept]
        cuts = np.zeros(len(text), np.bool_)
        cuts[1:] = parts[1:] != parts[:-1]
    return TokenRecord(number, text, position, mask, document_lengths(text, cuts, reading))


def document_lengths(ids: Ids, cuts: NDArray[np.bool_], reading: Reading) -> NDArray[np.int64] | None:
    """Lengths int64 [d] of the documents of a record, which begin at the cuts, bool [n], and, where that is asked for,
    after each end token; None where there is one."""
    if reading.bounds == "end_token":
        cuts[1:] |= ids[:-1] == reading.end_token
    if not cuts.any():
        return None
    return np.diff(np.concatenate([[0], np.flatnonzero(cuts), [len(cuts)]])).astype(np.int64)


def _mask(flags: Ids, ids: Ids, name: str) -> NDArray[np.bool_] | BadRecord:
    """bool [n] of flags (0, 1), or of labels, which are the ids themselves or -100."""
    if "label" not in name:
        wrong = np.flatnonzero((flags != 0) & (flags != 1))
        if len(wrong):
            return BadRecord(f"column {name!r} is {flags[wrong[0]]} at token {wrong[0]}, expected 0 or 1")
        return flags != 0
    wrong = np.flatnonzero((flags != LABELS_OFF) & (flags != ids))
    if len(wrong):
        return BadRecord(
            f"column {name!r} is {flags[wrong[0]]} at token {wrong[0]}, expected {LABELS_OFF} or the id "
            f"{ids[wrong[0]]} itself (labels that are shifted by one are not known here)"
        )
    return flags != LABELS_OFF
