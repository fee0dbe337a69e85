"""Commands on stores: seal, status, verify, inspect, stats, gc. They read files only; no model is loaded."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from typing import Any

from potstill.common.progress import Progress, format_seconds
from potstill.launch.command import DONE, INCOMPLETE, Command
from potstill.launch.text import format_bytes, table


def _store_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="folder of a tokens, targets or scores store")


def _json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _seal(arguments: argparse.Namespace) -> int:
    from potstill.storage import StoreReader, seal_store

    seal_store(arguments.store)
    with StoreReader(arguments.store) as reader:
        print(f"sealed {arguments.store}: {reader.num_rows} rows, {reader.num_tokens} tokens, digest {reader.digest}")
    return DONE


SEAL = Command(
    name="seal",
    summary="close a complete store: index, manifest, digest",
    description="Write the index and the manifest of a store whose units are all there. Readers refuse a store before "
    "that. A sealed store can be sealed again: nothing changes.",
    examples=("potstill seal data/targets",),
    add_arguments=_store_argument,
    run=_seal,
)


def _status(arguments: argparse.Namespace) -> int:
    from potstill.storage import store_status

    codes = []
    for path in arguments.stores:
        status = store_status(path)
        figures = asdict(status)
        codes.append(DONE if status.sealed else INCOMPLETE)
        if arguments.json:
            print(json.dumps({"store": str(path), **figures}, default=str))
            continue
        rows = [(name.replace("_", " "), _figure(name, value)) for name, value in figures.items()]
        print(f"{path}: {'sealed' if status.sealed else 'not sealed'}")
        print(table(["what", "figure"], rows))
    return max(codes)


def _figure(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("bytes"):
        return format_bytes(value)
    if name.endswith("seconds"):
        return format_seconds(value)
    if isinstance(value, float):
        return f"{value:,.1f}" if math.isfinite(value) else "-"
    if isinstance(value, list | tuple | frozenset | set):
        shown = sorted(value)
        return f"{len(shown)}" + (
            f": {', '.join(map(str, shown[:12]))}" + (", ..." if len(shown) > 12 else "") if shown else ""
        )
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stores", nargs="+", metavar="store", help="folders of stores")
    _json_argument(parser)


STATUS = Command(
    name="status",
    summary="how far a store is, from its files alone",
    description="Count committed, failed and missing units, rows per second over all workers, and the time left. Ends "
    "with 0 when every store is sealed, else with 3.",
    examples=("potstill status data/targets", "potstill status data/targets data/scores --json"),
    add_arguments=_status_arguments,
    run=_status,
)
