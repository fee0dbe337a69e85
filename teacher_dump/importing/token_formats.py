"""The table of formats of tokens. The configuration reads it, so nothing heavy is imported with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from potstill.teacher_dump.inputs import COMPRESSIONS

_COLUMNS = ("ids_column", "mask_column", "attention_column")
FORMAT_OPTIONS = ("dtype", *_COLUMNS)  # settings that not every format knows


@dataclass(frozen=True, kw_only=True)
class TokenFormat:
    """What the configuration and the search for files need to know of a format before its module is imported.

    module:      whole name of the module with `open_file(path, reading) -> TokenFile` (see token_file.py)
    description: one phrase for the help of `format`
    suffixes:    ends of the names of its files, by which a file or a folder is recognised
    beside:      ends of the names of files that belong to one of these and are never read by themselves
    options:     which of FORMAT_OPTIONS it reads; others are refused
    """

    module: str
    description: str
    suffixes: tuple[str, ...]
    beside: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


# In the order in which they are tried: `.bin` is Megatron's where an `.idx` lies beside it.
TOKEN_FORMATS: Mapping[str, TokenFormat] = {
    "megatron": TokenFormat(
        module="potstill.teacher_dump.importing.megatron",
        description=".bin with .idx (Megatron-LM, datatrove)",
        suffixes=(".idx",),
        beside=(".bin",),
    ),
    "array": TokenFormat(
        module="potstill.teacher_dump.importing.arrays",
        description=".npy with or without NumPy's header, .bin (OLMo-core, dolma, nanoGPT, llm.c)",
        suffixes=(".npy", ".bin"),
        beside=(".csv.gz",),
        options=("dtype",),
    ),
    "datatrove": TokenFormat(
        module="potstill.teacher_dump.importing.datatrove",
        description=".ds with .ds.index (datatrove, nanotron)",
        suffixes=(".ds",),
        beside=(".ds.index", ".ds.loss", ".ds.metadata"),
        options=("dtype",),
    ),
    "table": TokenFormat(
        module="potstill.teacher_dump.importing.tables",
        description=".parquet, .arrow, .feather, folders of save_to_disk",
        suffixes=(".parquet", ".arrow", ".feather"),
        options=_COLUMNS,
    ),
    "jsonl": TokenFormat(
        module="potstill.teacher_dump.importing.json_lines",
        description="JSON lines with a list of ids",
        suffixes=tuple(f"{kind}{packed}" for kind in (".jsonl", ".ndjson") for packed in ("", *COMPRESSIONS)),
        options=_COLUMNS,
    ),
}


def describe_formats() -> str:
    """All formats in one line of help."""
    return "; ".join(f"{name}: {entry.description}" for name, entry in TOKEN_FORMATS.items())
