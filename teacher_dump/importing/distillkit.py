"""DistillKit's data sets of compressed teacher logits: Parquet as its sampler writes it, and packed folders.

Columns of the current codec: input_ids, compressed_logprobs, bytepacked_indices; of the legacy one: input_ids,
packed_indices, exact_values, coeffs; packed sets add attention_mask = 1, 2, 3 .. by document. Stored position j is the
distribution after tokens 0..j.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.common.config import build_config, key_lines, parse_yaml
from potstill.common.errors import UserError
from potstill.teacher_dump.importing.distillkit_codec import CurrentCodec, LegacyCodec
from potstill.teacher_dump.importing.foreign_records import Entries, TargetsSource
from potstill.teacher_dump.importing.table_files import expanded, find_tables, first_columns, rectangle, schema_of
from potstill.teacher_dump.importing.table_source import Layout, TableSource
from potstill.teacher_dump.importing.targets_config import ImportTargetsConfig

CONFIG_NAME = "compression_config.yaml"
TOKENS, SEGMENTS = "input_ids", "attention_mask"
CURRENT = ("compressed_logprobs", "bytepacked_indices")
LEGACY = ("packed_indices", "exact_values", "coeffs")


def recognises(inputs: Sequence[str]) -> bool:
    """Whether the files are tables with DistillKit's columns."""
    names = set(first_columns(inputs))
    return set(CURRENT) <= names or set(LEGACY) <= names


def open_source(config: ImportTargetsConfig) -> TargetsSource:
    """Raises UserError: no compression_config.yaml, other columns than its codec has."""
    files = find_tables(config.input)
    names = schema_of(files[0]).names
    codec = _read_codec(config, legacy=set(LEGACY) <= set(names))
    segments = config.attention_column or (SEGMENTS if SEGMENTS in names else None)
    if isinstance(codec, LegacyCodec):
        layout = Layout(
            tokens=TOKENS, entries=LEGACY, decode=lambda row: _legacy(codec, row), values="logprobs", segments=segments
        )
    else:
        layout = Layout(
            tokens=TOKENS,
            entries=CURRENT,
            decode=lambda row: _current(codec, row),
            values="logprobs",
            segments=segments,
        )
    return TableSource(
        files,
        layout,
        format="distillkit",
        k=codec.k,
        settings={"compression_config": codec.model_dump(mode="json")},
        lost=_lost(codec),
    )


def _current(codec: CurrentCodec, row: Mapping[str, Any]) -> Entries:
    values, ids = (rectangle(row[name], name) for name in CURRENT)
    return Entries.of_table(codec.ids(ids), codec.values(values))


def _legacy(codec: LegacyCodec, row: Mapping[str, Any]) -> Entries:
    ids, exact, coefficients = (rectangle(row[name], name) for name in LEGACY)
    return Entries.of_table(codec.ids(ids), codec.values(exact, coefficients))


def _read_codec(config: ImportTargetsConfig, *, legacy: bool) -> CurrentCodec | LegacyCodec:
    path = Path(config.compression_config) if config.compression_config else _beside(config.input)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"compression_config {path} cannot be read ({error}): nothing in the files says how the values were "
            "compressed; name the file that their writer left as --compression-config"
        ) from error
    tree = parse_yaml(text, name=str(path))
    if not isinstance(tree, dict):
        raise UserError(f"compression_config {path}: expected keys and values, found {type(tree).__name__}")
    if legacy != ("polynomial_degree" in tree):
        columns = LEGACY if legacy else CURRENT
        raise UserError(
            f"compression_config {path} is of the {'current' if legacy else 'legacy'} codec, the files have the "
            f"columns {', '.join(columns)} of the other; name the file that was written with them"
        )
    model: type[CurrentCodec] | type[LegacyCodec] = LegacyCodec if legacy else CurrentCodec
    return build_config(model, tree, source=str(path), line_of=key_lines(text))


def _beside(inputs: Sequence[str]) -> Path:
    first = Path(expanded(inputs)[0]).expanduser()
    return (first if first.is_dir() else first.parent) / CONFIG_NAME


def _lost(codec: CurrentCodec | LegacyCodec) -> list[str]:
    fitted = codec.k - codec.exact_k
    lost = [f"the entries past the {codec.k} of each position, of which the mass of the tail remains"]
    if isinstance(codec, LegacyCodec):
        lost.append("rounding of the exact values to float16")
    elif codec.exact_dtype in ("bfloat16", "float16"):
        lost.append(f"rounding of the exact values to {codec.exact_dtype}, which moves the mass of the tail with them")
    if fitted:
        lost.append(
            f"{fitted} of the {codec.k} values are a fit: what it missed is lost, and where it is off it is read as "
            "DistillKit's own reader does"
        )
    return lost
