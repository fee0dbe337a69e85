"""What the writer demands of rows before a unit is encoded; every refusal names the row and the rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from potstill.storage.errors import StoreError
from potstill.storage.files.unit_file import row_sizes
from potstill.storage.rows.array_types import Float32
from potstill.storage.rows.column import Column, Values
from potstill.storage.rows.columns import COLUMNS, misfit
from potstill.storage.rows.only_rows import check_held_row
from potstill.storage.rows.row_types import Row, ScoresRow, TargetsRow, TokensRow
from potstill.storage.rows.scores_columns import check_scores_columns
from potstill.storage.rows.target_checks import check_kept_normaliser
from potstill.storage.rows.tokens_columns import TOKENS_COLUMNS
from potstill.storage.rows.validation import validate
from potstill.storage.store.spec import RunSpec

_TYPES = {"tokens": TokensRow, "targets": TargetsRow, "scores": ScoresRow}


def check_rows(rows: Sequence[Row], *, spec: RunSpec, wanted: range) -> None:
    """Raise StoreError unless `rows` are exactly the rows `wanted` (a prefix of it while num_rows is None)."""
    found = [row.row for row in rows]
    enough = len(rows) == len(wanted) or (spec.num_rows is None and 1 <= len(rows) <= len(wanted))
    if not enough or found != list(wanted[: len(rows)]):
        raise StoreError(
            f"unit holds the rows {wanted.start}..{wanted.stop - 1} in order, found {len(rows)} rows "
            f"{found[:3]}...; commit exactly writer.unit_rows(unit)"
        )
    for row in rows:
        try:
            _check_row(row, spec)
        except StoreError as error:
            raise StoreError(f"row {row.row}: {error}") from None


def row_stats(rows: Sequence[Row], *, spec: RunSpec) -> dict[str, tuple[float, ...]]:
    """Declared statistics as float32 values, one list per name."""
    return {name: tuple(float(np.float32(_stats_of(row)[name])) for row in rows) for name in spec.stats}


def _stats_of(row: Row) -> Mapping[str, float]:
    return {} if isinstance(row, TokensRow) else row.stats


def _check_row(row: Row, spec: RunSpec) -> None:
    wanted = _TYPES[spec.kind]
    if not isinstance(row, wanted):
        raise StoreError(f"found a {type(row).__name__}, a store of kind {spec.kind} holds {wanted.__name__}")
    num_tokens, _ = row_sizes(row)
    if not 1 <= num_tokens <= spec.row_length:
        raise StoreError(f"{num_tokens} tokens, expected 1..{spec.row_length}")
    if isinstance(row, TokensRow):
        _check_tokens(row, spec)
        return
    if not 0 <= row.token_digest < 1 << 64:
        raise StoreError(f"token digest {row.token_digest} is not an unsigned 64-bit number")
    if set(row.stats) != set(spec.stats):
        raise StoreError(f"statistics {sorted(row.stats)}, the run declares {sorted(spec.stats)}")
    for name, value in row.stats.items():
        if not np.isfinite(value):
            raise StoreError(f"statistic {name} is {value}; a store holds finite numbers only")
    if isinstance(row, TargetsRow):
        _check_targets(row, spec)
        if spec.only_rows is not None:
            check_held_row(row.stats, row.targets.num_entries)
    else:
        _check_scores(row)
        check_scores_columns(row.more, spec)


def _check_tokens(row: TokensRow, spec: RunSpec) -> None:
    for name, array in (("tokens", row.tokens), ("doc_lens", row.doc_lens)):
        if array.ndim != 1 or array.dtype != np.int32:
            raise StoreError(f"{name}: found {array.dtype} of shape {array.shape}, expected one-dimensional int32")
    if spec.stats:
        raise StoreError("a tokens store keeps no statistics; declare none")
    low, high = int(row.tokens.min()), int(row.tokens.max())
    if low < 0 or high >= spec.vocab_size:
        raise StoreError(f"token ids {low}..{high} are not all in [0, {spec.vocab_size}); wrong tokenizer?")
    if not len(row.doc_lens) or int(row.doc_lens.min()) < 1 or int(row.doc_lens.sum()) != len(row.tokens):
        raise StoreError(
            f"document lengths must be >= 1 and sum to {len(row.tokens)} tokens, found sum "
            f"{int(row.doc_lens.sum())}; leave empty documents out"
        )
    check_tokens_columns(row, spec)


def check_tokens_columns(row: TokensRow, spec: RunSpec) -> None:
    """Raise StoreError unless the row has what its store has besides tokens and documents, within the rules."""
    further = [name for name in TOKENS_COLUMNS if name != "mask"]
    alien = sorted(row.more.keys() - set(further))
    if alien:
        raise StoreError(
            f"more: no columns {alien} of tokens are known, only {further} (storage/rows/tokens_columns.py)"
        )
    for name, column in TOKENS_COLUMNS.items():
        column.check_row(row.column(name), num_tokens=len(row.tokens), spec=spec)


def _check_targets(row: TargetsRow, spec: RunSpec) -> None:
    targets = row.targets
    validate(targets, vocab_size=spec.vocab_size, strict=True)
    if spec.normaliser == "kept":
        check_kept_normaliser(targets, strict=True)
    for column in COLUMNS.values():
        if column.per_temperature:
            at = targets.columns.get(column.name, {})
            found = sorted(at) if isinstance(at, Mapping) else []
            if set(found) != set(spec.temperatures):
                raise StoreError(f"{column.name} has {found}, the run declares {sorted(spec.temperatures)}")
    if targets.num_draws != spec.num_draws:
        raise StoreError(f"num_draws is {targets.num_draws}, the selection of the run says {spec.num_draws}")
    for name, column in COLUMNS.items():
        _check_column(column, targets.columns.get(name), spec)
    most = int(np.diff(targets.offsets).max())
    if most > spec.max_entries:
        raise StoreError(f"{most} entries at one token, the selection allows {spec.max_entries}")


def _check_column(column: Column, values: Values | None, spec: RunSpec) -> None:
    """A column must be there exactly where the store has it, in the size that the run says."""
    said_elsewhere = column.stored is not None and not column.stored.otherwise
    if not said_elsewhere and (
        (values is None and column.is_stored(spec) and not column.optional)
        or (values is not None and not column.is_stored(spec))
    ):
        raise misfit(column, spec)
    if values is None or isinstance(values, Mapping):
        return
    if column.axis == "row" and len(values) != 1:
        raise StoreError(f"{column.name}: found {len(values)} values, expected one for the row")
    if column.vector is not None and values.shape[1] != column.vector(spec):
        raise StoreError(f"{column.name}: found vectors of {values.shape[1]}, the run says {column.vector(spec)}")


def _check_scores(row: ScoresRow) -> None:
    columns: dict[str, Float32] = {"label_logprob": row.label_logprob, "entropy": row.entropy}
    for name, array in columns.items():
        if array.shape != row.label_logprob.shape or array.dtype != np.float32 or not np.isfinite(array).all():
            raise StoreError(f"{name}: expected finite float32 per token, found {array.dtype} {array.shape}")
    if row.label_rank.shape != row.label_logprob.shape or row.label_rank.dtype != np.int32:
        raise StoreError(f"label_rank: expected int32 per token, found {row.label_rank.dtype}")
    if (row.label_logprob > 1e-3).any() or (row.entropy < -1e-3).any() or (row.label_rank < 0).any():
        raise StoreError("label_logprob must be <= 0, entropy and label_rank >= 0")
