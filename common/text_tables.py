"""Tables and figures as text: by rich on a terminal, plain and never cut where nobody looks (a pipe, a file)."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from potstill.common.progress import is_terminal

if TYPE_CHECKING:
    from rich.table import Table

_WIDEST = 1_000_000  # of a plain table: a line is as long as its cells are


def rich_table(header: Sequence[str], rows: Sequence[Sequence[object]], *, align: str = "", title: str = "") -> Table:
    """A table for a terminal; its cells are text, never markup. `align`: see `table`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title or None, title_justify="left", title_style="bold")
    for name, side in zip(header, align or "<".ljust(len(header), ">"), strict=True):
        made.add_column(Text(name), justify="left" if side == "<" else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    return made


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, align: str = "") -> str:
    """Lay out rows under a header as plain text, however wide. `align`: `<` or `>` per column; else the first goes
    left, the others right."""
    from rich.box import Box
    from rich.console import Console

    made = rich_table(header, rows, align=align)
    # Under the header a line of dashes; between columns two spaces, one of them the divider.
    made.box = Box("    \n    \n -  \n    \n    \n    \n    \n    \n", ascii=True)
    made.show_edge, made.padding = False, (0, 1, 0, 0)
    sink = io.StringIO()
    Console(file=sink, width=_WIDEST, color_system=None, force_terminal=False, legacy_windows=False).print(made)
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines())


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]], *, align: str = "", title: str = "") -> None:
    """Print a table on standard output, under its title: folded to the width of a terminal, plain elsewhere."""
    if is_terminal(sys.stdout):
        from rich.console import Console

        Console().print(rich_table(header, rows, align=align, title=title))
        return
    if title:
        print(title)
    print(table(header, rows, align=align))
