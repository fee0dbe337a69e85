"""Sizes as text, for every command alike."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """Write a number of bytes with a binary unit: `512 B`, `3.4 MiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
