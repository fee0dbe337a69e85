"""Tables and figures as text, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def format_bytes(count: float) -> str:
    """Write a number of bytes with a binary unit: `512 B`, `3.4 MiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, align: str = "") -> str:
    """Lay out rows under a header. `align`: `<` or `>` per column; else the first goes left, the others right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        sides = align or "<".ljust(len(row), ">")
        laid = [
            cell.ljust(width) if side == "<" else cell.rjust(width)
            for cell, width, side in zip(row, widths, sides, strict=True)
        ]
        lines.append("  ".join(laid).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
