"""The table of formats of targets. The configuration reads it, so nothing heavy is imported with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TargetFormat:
    """What the configuration needs to know of a format before its module is imported.

    module:      whole name of the module with `open_source(config) -> TargetsSource` (see base.py) and
                 `recognises(inputs) -> bool`, by the names of the files and of their columns
    description: one phrase for the help of `format`
    options:     keys of ImportTargetsConfig that it reads and not every other format does
    """

    module: str
    description: str
    options: tuple[str, ...] = ()


# In the order in which they are tried.
TARGET_FORMATS: Mapping[str, TargetFormat] = {
    "distillkit": TargetFormat(
        module="potstill.teacher_dump.importing.targets.distillkit",
        description="DistillKit's compressed log-probabilities (Parquet, packed folders; current and legacy codec)",
        options=("compression_config", "attention_column"),
    ),
    "topk_parquet": TargetFormat(
        module="potstill.teacher_dump.importing.targets.topk_parquet",
        description="lists of ids and values in Parquet, Arrow or folders of save_to_disk",
        options=("tokens_column", "ids_column", "values_column", "normaliser_column", "attention_column", "values"),
    ),
    "megatron_logits": TargetFormat(
        module="potstill.teacher_dump.importing.targets.megatron_logits",
        description="Megatron-LM's cached logits (tars of .pt.zst)",
    ),
}


def describe_formats() -> str:
    """All formats in one line of help."""
    return "; ".join(f"{name}: {entry.description}" for name, entry in TARGET_FORMATS.items())
