"""Top-k ids and values in plain columns of Parquet or Arrow files: lists of lists [n, k] beside a list of tokens [n].

Layouts of public data sets are known by their column names (LAYOUTS, first that fits); other names are options.
codys12/LlamaKD has one column [n, 2, k]: log-probabilities, then ids as floating point. arcee-ai/LLama-405B-Logits has
raw logits, and probabilities over their k alone: no value over the vocabulary can be had from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from potstill.common.errors import UserError
from potstill.storage.rows.k_bound import MAX_K
from potstill.teacher_dump.importing.foreign_records import Entries, TargetsSource, ValueKind
from potstill.teacher_dump.importing.table_files import (
    find_tables,
    first_columns,
    nested_numbers,
    nested_rectangle,
    numbers,
    read_table,
    schema_of,
)
from potstill.teacher_dump.importing.table_source import Layout, TableSource, whole_numbers
from potstill.teacher_dump.importing.targets_config import ImportTargetsConfig
from potstill.teacher_dump.inputs import InputFile
from potstill.teacher_dump.records.base import BadRecord

SEGMENTS = "attention_mask"
TOKENS_NAMES = ("input_ids", "tokens", "inputs")
IDS_NAMES = ("topk_ids", "top_ids", "token_ids", "topk_indices", "top_k_indices", "indices")
# What values of that name are; the first that is there is taken.
VALUES_NAMES: dict[str, ValueKind] = {
    "topk_logprobs": "logprobs",
    "top_logprobs": "logprobs",
    "logprobs": "logprobs",
    "log_probs": "logprobs",
    "topk_log_probs": "logprobs",
    "top_values": "logits",
    "topk_logits": "logits",
    "top_logits": "logits",
    "logits": "logits",
    "topk_probs": "probabilities",
    "probs": "probabilities",
}
NORMALISER_NAMES = ("logsumexp", "lse", "log_normaliser", "log_normalizer")


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a layout; `ids` is None where values and ids stand in one column [n, 2, k]."""

    tokens: str
    ids: str | None
    values: str
    kind: ValueKind
    normaliser: str | None = None


# Layouts whose names the general rule would not find.
LAYOUTS = (Columns(tokens="inputs", ids=None, values="targets", kind="logprobs"),)  # LlamaKD


def recognises(inputs: Sequence[str]) -> bool:
    """Whether the files are tables, whose columns are known or can be named."""
    return bool(first_columns(inputs))


def open_source(config: ImportTargetsConfig) -> TargetsSource:
    """Raises UserError where columns are not there or not named, or the entries are more than a store holds."""
    files = find_tables(config.input)
    names = schema_of(files[0]).names
    columns = _choose(config, names, str(files[0].path))
    segments = config.attention_column or (SEGMENTS if SEGMENTS in names else None)
    layout = Layout(
        tokens=columns.tokens,
        entries=tuple(name for name in (columns.ids, columns.values, columns.normaliser) if name is not None),
        decode=lambda row: _entries(row, columns),
        values=columns.kind,
        segments=segments,
        has_normaliser=columns.normaliser is not None,
    )
    k = _width(files, layout, config)
    read = {"tokens": columns.tokens, "ids": columns.ids, "values": columns.values, "normaliser": columns.normaliser}
    return TableSource(
        files,
        layout,
        format="topk_parquet",
        k=k,
        settings={"columns": {name: value for name, value in (read | {"segments": segments}).items() if value}},
        lost=[f"the entries past the {k} of each position"],
    )


def _choose(config: ImportTargetsConfig, names: Sequence[str], where: str) -> Columns:
    named = (config.tokens_column, config.ids_column, config.values_column, config.normaliser_column)
    if not any(named):
        for known in LAYOUTS:
            if {known.tokens, known.values} <= set(names):
                return known
    tokens = config.tokens_column or _first(TOKENS_NAMES, names)
    values = config.values_column or _first(tuple(VALUES_NAMES), names)
    ids = config.ids_column or _first(IDS_NAMES, names)
    wanted = {"tokens_column": tokens, "ids_column": ids, "values_column": values}
    missing = [key for key, name in wanted.items() if name is None]
    if tokens is None or values is None or (ids is None and not config.values_column):
        raise UserError(f"{where}: cannot tell the columns apart (found {', '.join(names)}); set {', '.join(missing)}")
    return Columns(
        tokens=tokens,
        ids=ids,
        values=values,
        kind=VALUES_NAMES.get(values, "logprobs"),
        normaliser=config.normaliser_column or _first(NORMALISER_NAMES, names),
    )


def _first(known: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in known if name in names), None)


def _entries(row: Mapping[str, Any], columns: Columns) -> Entries:
    if columns.ids is None:
        both = nested_rectangle(row[columns.values], columns.values)
        if both.shape[1] != 2:
            raise BadRecord(f"{columns.values} has {both.shape[1]} lists at a position, expected values and ids")
        ids = whole_numbers(both[:, 1].reshape(-1), f"{columns.values} (ids)")
        return Entries.of_table(ids.reshape(len(both), -1), both[:, 0])
    lengths, ids = nested_numbers(row[columns.ids], columns.ids)
    other, values = nested_numbers(row[columns.values], columns.values)
    if len(lengths) != len(other) or (lengths != other).any():
        raise BadRecord(f"{columns.ids} and {columns.values} do not have the same number of items at every position")
    normaliser = None
    if columns.normaliser is not None:
        normaliser = numbers(row[columns.normaliser], columns.normaliser).astype(np.float64)
        if len(normaliser) != len(lengths):
            raise BadRecord(f"{columns.normaliser} has {len(normaliser)} items for {len(lengths)} positions")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Entries(offsets, whole_numbers(ids, columns.ids), values.astype(np.float64), normaliser)


def _width(files: Sequence[InputFile], layout: Layout, config: ImportTargetsConfig) -> int:
    """Entries of a position at most: those of the first sound record if all of its positions have as many."""
    for found in read_table(files[0], layout.entries, start=0):
        try:
            counts = np.diff(layout.decode(found.values).offsets)
        except BadRecord:
            continue
        if len(counts):
            return int(counts[0]) if (counts == counts[0]).all() else config.k or MAX_K
    raise UserError(f"{files[0].path}: no record of {', '.join(layout.entries)} can be read; see --values-column")
