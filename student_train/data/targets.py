"""Targets of a micro-batch's rows side by side, of one targets store or of several sources' own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from potstill.kernels.types import SparseTargetTensors
from potstill.storage import SparseTargets, TargetsRow, concatenate
from potstill.storage.rows.columns import COLUMNS


def row_targets(rows: Sequence[TargetsRow | None], lengths: Sequence[int]) -> SparseTargetTensors | None:
    """Targets of the rows' tokens, row after row, without padding; None where no row has any.

    rows: None for a row whose source has no such store, `lengths` tokens long: it gets no target. Rows of several
    stores are given what all of them hold: a side column, or the tail at a temperature, that one lacks is left out.
    """
    known = [row.targets for row in rows if row is not None]
    if not known:
        return None
    shared = iter(_shared_columns(known))
    of_rows = [None if row is None else next(shared) for row in rows]
    blank = next(part for part in of_rows if part is not None).slice(0, 0)
    parts = [
        blank.without_targets(length) if part is None else part for part, length in zip(of_rows, lengths, strict=True)
    ]
    return SparseTargetTensors.from_arrays(concatenate(parts))


def _shared_columns(parts: Sequence[SparseTargets]) -> Sequence[SparseTargets]:
    """The parts with the columns of tokens, and the temperatures, that all of them have; themselves where these agree.

    Columns of entries stay: what the loss reads of them was checked against each store before the run.
    """
    held = [_token_columns(part) for part in parts]
    draws = {part.num_draws for part in parts}
    if len(draws) == 1 and all(columns == held[0] for columns in held):
        return parts
    shared = frozenset.intersection(*held)
    found = []
    for part in parts:
        columns = dict(part.columns)
        for name, values in part.columns.items():
            if COLUMNS[name].axis != "token":
                continue
            if isinstance(values, Mapping):
                columns[name] = {at: value for at, value in values.items() if (name, at) in shared}
            elif (name, None) not in shared:
                del columns[name]
        # Stores of other numbers of draws: the loss then counts those of each token itself.
        num_draws = part.num_draws if len(draws) == 1 else None
        found.append(SparseTargets(offsets=part.offsets, columns=columns, num_draws=num_draws))
    return found


def _token_columns(part: SparseTargets) -> frozenset[tuple[str, float | None]]:
    """The columns of tokens as (name, None), or one (name, temperature) for each of its temperatures."""
    found: set[tuple[str, float | None]] = set()
    for name, values in part.columns.items():
        if COLUMNS[name].axis == "token":
            found |= {(name, float(at)) for at in values} if isinstance(values, Mapping) else {(name, None)}
    return frozenset(found)
