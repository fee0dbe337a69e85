"""The packing rules. A new one is a module beside this one and an entry here.

The configuration reads the table, so nothing heavy is imported with it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PackingEntry:
    """module: whole name of the module with `make(PackerStart) -> Packer`; description: a phrase for the help."""

    module: str
    description: str


PACKINGS: dict[str, PackingEntry] = {
    "cut": PackingEntry(
        module="potstill.teacher_dump.packing.cut",
        description="documents end to end, cut every row_length tokens",
    ),
    "whole": PackingEntry(
        module="potstill.teacher_dump.packing.whole",
        description="whole documents, so that rows may be shorter",
    ),
    "rows": PackingEntry(
        module="potstill.teacher_dump.packing.rows",
        description="each record is a row of its own",
    ),
}


def describe_packings() -> str:
    """All rules in one line of help."""
    return "; ".join(f"{name}: {entry.description}" for name, entry in PACKINGS.items())
