"""`potstill status`: how far stores are, once or again and again until they are done."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from potstill.common.exit_codes import DONE, INCOMPLETE
from potstill.common.progress import format_seconds, is_terminal
from potstill.common.sizes import format_bytes
from potstill.common.text_tables import print_table, rich_table
from potstill.launch.command import Command

if TYPE_CHECKING:
    from rich.console import Group

    from potstill.storage import StoreStatus

WATCH_SECONDS = 5.0
SEALING_SECONDS = 60.0  # a complete store is looked at for so long, as its last worker may be about to seal it
# Of a store of many units; counts of units are exact, as far as names are.
_ESTIMATED = ("rate_rows_per_second", "eta_seconds", "worker_seconds", "active_seconds", "bytes")
Looks = Sequence[tuple[str, "StoreStatus"]]


def _look(stores: Sequence[str]) -> Looks:
    from potstill.storage import store_status

    return [(str(path), store_status(path)) for path in stores]


def _code(looks: Looks) -> int:
    return DONE if all(status.sealed for _, status in looks) else INCOMPLETE


def _status(arguments: argparse.Namespace) -> int:
    if arguments.watch is not None:
        return _watch(arguments.stores, seconds=arguments.watch, as_json=arguments.json)
    looks = _look(arguments.stores)
    for path, status in looks:
        if arguments.json:
            print(_json(path, status))
        else:
            print_table(["what", "figure"], _rows(status), title=_title(path, status))
    return _code(looks)


def _watch(stores: Sequence[str], *, seconds: float, as_json: bool) -> int:
    """Show the stores every so many seconds until all are sealed, or complete and left unsealed."""
    if is_terminal(sys.stdout) and not as_json:
        from rich.live import Live

        looks = _look(stores)
        live = Live(_page(looks), auto_refresh=False)
        try:  # as a context manager it would leave the cursor hidden when Ctrl-C comes during the first page
            live.start(refresh=True)
            return _until_done(stores, seconds, lambda looks: live.update(_page(looks), refresh=True))
        finally:
            live.stop()
    told: dict[str, str] = {}

    def tell(looks: Looks) -> None:
        for path, status in looks:
            line = _json(path, status) if as_json else f"{path}: {status_line(status)}"
            if told.get(path) != line:
                print(line if as_json else f"{time.strftime('%H:%M:%S')} {line}", flush=True)
            told[path] = line

    return _until_done(stores, seconds, tell)


def _until_done(stores: Sequence[str], seconds: float, tell: Any) -> int:
    complete_since: float | None = None
    while True:
        looks = _look(stores)
        tell(looks)
        if _code(looks) == DONE:
            return DONE
        if all(status.sealed or status.missing == 0 for _, status in looks):
            complete_since = time.monotonic() if complete_since is None else complete_since
            if time.monotonic() - complete_since >= SEALING_SECONDS:
                unsealed = " ".join(path for path, status in looks if not status.sealed)
                print(f"potstill status: complete, but not sealed; run: potstill seal {unsealed}", file=sys.stderr)
                return INCOMPLETE
        else:
            complete_since = None
        time.sleep(seconds)


def _json(path: str, status: StoreStatus) -> str:
    return json.dumps({"store": path, **asdict(status)}, default=str)


def _title(path: str, status: StoreStatus) -> str:
    return f"{path}: {'sealed' if status.sealed else 'not sealed'}"


def _rows(status: StoreStatus) -> list[tuple[str, str]]:
    figures = [(name, _figure(name, value)) for name, value in asdict(status).items() if name != "estimated"]
    about = _ESTIMATED if status.estimated else ()
    return [(n.replace("_", " "), f"about {text}" if n in about and text != "-" else text) for n, text in figures]


def status_line(status: StoreStatus) -> str:
    """The state of a store in one line, for a log."""
    units = f"{status.committed}/{status.num_units}" if status.num_units is not None else str(status.committed)
    parts = ["sealed"] if status.sealed else []
    parts += [f"{units} units", f"{status.rows_committed:,} rows", format_bytes(status.bytes)]
    if status.failed:
        parts.append(f"{status.failed} failed")
    if not status.sealed and status.rate_rows_per_second is not None:
        parts.append(f"{status.rate_rows_per_second:,.1f} rows/s")
    if not status.sealed and status.eta_seconds:
        parts.append(f"ETA {format_seconds(status.eta_seconds)}")
    return ", ".join(parts)


def _page(looks: Looks) -> Group:
    """All stores, each with a bar where it is known how many units there will be."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    parts: list[Any] = []
    for path, status in looks:
        parts.append(Text(f"{path}: {status_line(status)}", style="bold"))
        if status.num_units:
            parts.append(ProgressBar(total=status.num_units, completed=status.committed, width=60))
        parts.append(rich_table(["what", "figure"], _rows(status)))
    parts.append(Text(f"{time.strftime('%H:%M:%S')}, Ctrl-C to leave", style="dim"))
    return Group(*parts)


def _figure(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("bytes"):
        return format_bytes(value)
    if name.endswith("seconds"):
        return format_seconds(value)
    if isinstance(value, float):
        return f"{value:,.1f}" if math.isfinite(value) else "-"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of seconds; name the stores first: potstill status STORE --watch"
        ) from None
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} seconds; give a number above 0")
    return value


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stores", nargs="+", metavar="store", help="folders of stores")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=_seconds,
        const=WATCH_SECONDS,
        metavar="SECONDS",
        help=f"look again every so many seconds (default {WATCH_SECONDS:g}) until the stores are sealed; on a terminal "
        "the page is drawn again in place, elsewhere a line is printed when something has changed",
    )


STATUS = Command(
    name="status",
    summary="how far a store is, from its files alone",
    description="Count committed, failed and missing units, rows per second over all workers, and the time left. Ends "
    "with 0 when every store is sealed, else with 3. With --watch it runs until then; a store that is complete and "
    f"not sealed for {SEALING_SECONDS:g} seconds ends it with 3, Ctrl-C with 130.",
    examples=(
        "potstill status data/targets",
        "potstill status data/targets data/scores --json",
        "potstill status data/targets --watch 10",
    ),
    add_arguments=_status_arguments,
    run=_status,
)
