"""The table of formats of targets. The configuration reads it, so nothing heavy is imported with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TargetFormat:
    """What the configuration needs to know of a format before its module is imported.

    module:      whole name of the module with `open_source(config) -> TargetsSource` (see foreign_records.py) and
                 `recognises(inputs) -> bool`, by the names of the files and of their columns
    description: one phrase for the help of `format`
    """

    module: str
    description: str


# In the order in which they are tried.
TARGET_FORMATS: Mapping[str, TargetFormat] = {
    "distillkit": TargetFormat(
        module="potstill.teacher_dump.importing.distillkit",
        description="DistillKit's compressed log-probabilities (Parquet, packed folders; current and legacy codec)",
    ),
    "topk_parquet": TargetFormat(
        module="potstill.teacher_dump.importing.topk_parquet",
        description="lists of ids and values in Parquet, Arrow or folders of save_to_disk",
    ),
    "megatron_logits": TargetFormat(
        module="potstill.teacher_dump.importing.megatron_logits",
        description="Megatron-LM's cached logits (tars of .pt.zst)",
    ),
}


def describe_formats() -> str:
    """All formats in one line of help."""
    return "; ".join(f"{name}: {entry.description}" for name, entry in TARGET_FORMATS.items())
