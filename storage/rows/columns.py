"""The columns of a targets store, in the order of the file. A new column is one entry of COLUMNS.

The entry drives everything else: build and checks, codec and files, verify, slices and joins, pinning, and the
tensors that a loss works on. `count` (entries per token, from which the offsets follow) is the frame of the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from potstill.storage.errors import CorruptError, StoreError
from potstill.storage.rows import value_grid
from potstill.storage.rows.array_types import NO_RANK, UInt8
from potstill.storage.rows.column import Array, Coding, Column, Condition, StoreView, TargetArrays
from potstill.storage.rows.planes import join_ids, num_id_planes, split_ids
from potstill.storage.rows.scores_columns import SCORES_COLUMNS, ScoresColumn
from potstill.storage.rows.target_checks import (
    check_counts,
    check_entropy,
    check_grid_weights,
    check_ids,
    check_log_mass,
    check_log_probability,
    check_logprobs,
    check_rank,
)
from potstill.storage.rows.tokens_columns import TOKENS_COLUMNS, TokensColumn

AnyColumn = Column | TokensColumn | ScoresColumn
ALWAYS = Condition(lambda spec: spec.kind == "targets")


def _power(spec: StoreView) -> float:
    return float((spec.selection or {}).get("power", 1.0))


def _keeps_logprobs(spec: StoreView) -> bool:
    if spec.kind != "targets" or not spec.selection:
        return False
    return spec.selection["mode"] != "sample"


def _encode_ids(ids: Array, coding: Coding) -> Sequence[UInt8]:
    stored = ids if coding.id_table is None else coding.id_table.take(ids)
    return split_ids(stored, num_id_planes(coding.spec.vocab_size))


def _decode_ids(planes: Sequence[UInt8], coding: Coding) -> Array:
    ids, vocab_size = join_ids(list(planes)), coding.spec.vocab_size
    if ids.size and int(ids.max()) >= vocab_size:
        raise CorruptError(f"id {int(ids.max())} is not below the vocabulary size {vocab_size}")
    return ids if coding.id_table is None else coding.id_table.take(ids)


def _codes(encode: Callable[[Array], UInt8]) -> Callable[[Array, Coding], Sequence[UInt8]]:
    """`encode` for a column of one plane whose codes depend on the values alone."""
    return lambda values, coding: (encode(values),)


def _values(decode: Callable[[UInt8], Array]) -> Callable[[Sequence[UInt8], Coding], Array]:
    """Likewise."""
    return lambda planes, coding: decode(planes[0])


def _same(array: Array) -> Array:
    return array


_TABLE = (
    Column(
        name="ids",
        axis="entry",
        dtype=np.int32,
        plane="id",
        num_planes=lambda spec: num_id_planes(spec.vocab_size),
        encode=_encode_ids,
        decode=_decode_ids,
        check=check_ids,
        stored=ALWAYS,
    ),
    Column(
        name="logprobs",
        axis="entry",
        dtype=np.float32,
        plane="val",
        encode=lambda values, coding: (value_grid.encode_gaps(values, coding.offsets),),
        decode=lambda planes, coding: value_grid.decode_gaps(planes[0], coding.counts, coding.offsets),
        check=check_logprobs,
        stored=Condition(_keeps_logprobs, "keeps log-probabilities", "keeps draws only (logprobs=None)"),
    ),
    Column(
        name="counts",
        axis="entry",
        dtype=np.uint8,
        plane="draws",
        encode=_codes(_same),
        decode=_values(_same),
        check=check_counts,
        stored=Condition(lambda spec: spec.num_draws is not None and _power(spec) == 1.0, "keeps draw counts"),
    ),
    Column(
        name="log_weights",
        axis="entry",
        dtype=np.float32,
        plane="weight",
        encode=lambda values, coding: (value_grid.encode_weights(values, coding.offsets),),
        decode=lambda planes, coding: value_grid.decode_weights(planes[0], coding.counts, coding.offsets),
        check=check_grid_weights,
        feature="importance_weights",
        feature_rule="draws of a power other than 1 come with importance_weights",
        stored=Condition(
            lambda spec: spec.num_draws is not None and _power(spec) != 1.0,
            "keeps log weights",
            "keeps no log weights",
        ),
    ),
    Column(
        name="log_tail",
        axis="token",
        dtype=np.float32,
        plane="tail",
        encode=_codes(value_grid.encode_tail),
        decode=_values(value_grid.decode_tail),
        check=check_log_mass,
        stored=ALWAYS,
    ),
    Column(
        name="entropy",
        axis="token",
        dtype=np.float32,
        encode=_codes(value_grid.encode_entropy),
        decode=_values(value_grid.decode_entropy),
        check=check_entropy,
        stored=ALWAYS,
        optional=True,
        on_device=False,
    ),
    Column(
        name="label_logprob",
        axis="token",
        dtype=np.float32,
        plane="label",
        encode=_codes(value_grid.encode_log),
        decode=_values(value_grid.decode_log),
        check=check_log_probability,
        stored=ALWAYS,
        optional=True,
        on_device=False,
    ),
    Column(
        name="label_rank",
        axis="token",
        dtype=np.int32,
        encode=_codes(value_grid.encode_rank),
        decode=_values(lambda codes: codes.astype(np.int32)),
        check=check_rank,
        stored=ALWAYS,
        optional=True,
        fill=NO_RANK,
        on_device=False,
    ),
    Column(
        name="log_tail_at",
        axis="token",
        dtype=np.float32,
        plane="tail_at",
        per_temperature=True,
        encode=lambda values, coding: (value_grid.encode_odds(values, coding.counts),),
        decode=lambda planes, coding: value_grid.decode_odds(planes[0], coding.counts),
        check=check_log_mass,
        stored=ALWAYS,
    ),
)
COLUMNS: dict[str, Column] = {column.name: column for column in _TABLE}


def stored_columns(spec: StoreView) -> list[Column]:
    """The columns of a store of that run, in file order."""
    return [column for column in COLUMNS.values() if column.is_stored(spec)]


def skippable_names() -> tuple[str, ...]:
    """What a reader may be told to leave out: the names of the planes without their numbers."""
    return tuple(column.stem for column in COLUMNS.values() if column.skippable)


def column_features() -> dict[str, list[AnyColumn]]:
    """The columns that come with each feature, of targets, tokens and scores."""
    found: dict[str, list[AnyColumn]] = {}
    columns: list[AnyColumn] = [*COLUMNS.values(), *TOKENS_COLUMNS.values(), *SCORES_COLUMNS.values()]
    for column in columns:
        if column.feature is not None:
            found.setdefault(column.feature, []).append(column)
    return found


def misfit(column: Column, spec: StoreView) -> StoreError:
    """The error of targets that have a column which their store has not, or the other way round."""
    if column.stored is None:
        rule = "names the column" if column.is_stored(spec) else "does not name the column"
        return StoreError(f"{column.name} does not fit: the run {rule}; its columns are {list(spec.columns)}")
    rule = column.stored.rule if column.is_stored(spec) else column.stored.otherwise
    return StoreError(f"{column.name} do not fit: the selection {dict(spec.selection or {})} {rule}")


def check_pairing(targets: TargetArrays) -> None:
    """Which values of entries may stand together: log-probabilities, draw counts, or log weights alone."""
    columns, num_draws = targets.columns, targets.num_draws
    if "log_weights" in columns:
        if "logprobs" in columns or "counts" in columns or num_draws is None:
            raise StoreError("log_weights come with num_draws, and with neither logprobs nor counts")
        return
    if "logprobs" not in columns and "counts" not in columns:
        raise StoreError("targets hold neither logprobs nor counts; give at least one of them")
    if ("counts" in columns) != (num_draws is not None):
        raise StoreError("counts and num_draws belong together; give both (sample mode) or none")


def namable_columns(kind: str) -> list[str]:
    """The columns that a run of that kind names in `columns` where its store has them."""
    if kind == "targets":
        return [name for name, column in COLUMNS.items() if column.stored is None]
    return list(TOKENS_COLUMNS if kind == "tokens" else SCORES_COLUMNS)


def known(names: Mapping[str, object]) -> None:
    """Raise StoreError where a name is that of no column."""
    alien = sorted(names.keys() - COLUMNS.keys())
    if alien:
        raise StoreError(f"targets have no columns {alien}; known are {list(COLUMNS)} (storage/rows/columns.py)")
