"""Commands on stores: seal, stats, gc. They read files only; no model is loaded."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from potstill.common.exit_codes import DONE, INCOMPLETE
from potstill.common.sizes import format_bytes
from potstill.launch.command import Command


def _store_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="folder of a tokens, targets or scores store")


def _json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _seal(arguments: argparse.Namespace) -> int:
    from potstill.storage import UnsealedError, check_key, seal_store, sign_store, write_card

    if arguments.sign is not None:
        check_key(arguments.sign)
    try:
        manifest = seal_store(arguments.store, fast=arguments.fast, again=True)
    except UnsealedError as error:
        # Not a fault: units are still to come. A damaged store ends with the code of an error instead.
        print(f"potstill seal: {error}", file=sys.stderr)
        return INCOMPLETE
    print(
        f"sealed {arguments.store}: {manifest.num_rows} rows, {manifest.num_tokens} tokens, "
        f"{format_bytes(manifest.num_bytes)}, digest {manifest.store_digest}"
    )
    if arguments.sign is not None:
        sign_store(arguments.store, arguments.sign)
        print(f"signed with {arguments.sign}: manifest.json.sig")
    if arguments.card:
        said = "dataset card written" if write_card(arguments.store) else "its dataset card stands there already"
        print(f"{said}: README.md; fill in the licence before you publish")
    return DONE


def _seal_arguments(parser: argparse.ArgumentParser) -> None:
    _store_argument(parser)
    parser.add_argument(
        "--fast", action="store_true", help="look at the sizes of the units only; the manifest says so (bytes_checked)"
    )
    parser.add_argument(
        "--sign", type=Path, metavar="KEY", help="sign the store with an ssh key (or one that an agent holds)"
    )
    parser.add_argument("--card", action="store_true", help="write a dataset card for the hub beside it (README.md)")


SEAL = Command(
    name="seal",
    summary="close a complete store: index, manifest, digest",
    description="Write the index and the manifest of a store whose units are all there, after every byte of them was "
    "read back and held against its checksum. Readers refuse a store before that. A sealed store can be sealed again: "
    "it is read once more, and nothing changes. Ends with 3 while units are missing, with 1 when the store is damaged; "
    "potstill repair is what helps then.",
    examples=(
        "potstill seal data/targets",
        "potstill seal data/targets --sign ~/.ssh/id_ed25519",
        "potstill seal data/targets --card",
    ),
    add_arguments=_seal_arguments,
    run=_seal,
)


def _stats(arguments: argparse.Namespace) -> int:
    from potstill.storage import store_stats

    stats = store_stats(arguments.store, max_rows=arguments.max_rows)
    print(json.dumps(asdict(stats), default=dict) if arguments.json else stats.format())
    return DONE


def _stats_arguments(parser: argparse.ArgumentParser) -> None:
    _store_argument(parser)
    _json_argument(parser)
    parser.add_argument("--max-rows", type=int, default=512, metavar="N", help="rows read, evenly spaced (default 512)")


STATS = Command(
    name="stats",
    summary="bytes by column; histograms of kept count, kept mass, entropy, label rank; how full rows are",
    description="Print the totals of a sealed store, and figures over some of its rows, evenly spaced; of tokens "
    "also the share of tokens trained on, how full its rows are, and how many are short or have nothing to predict.",
    examples=("potstill stats targets/train", "potstill stats scores --json"),
    add_arguments=_stats_arguments,
    run=_stats,
)


def _gc(arguments: argparse.Namespace) -> int:
    from potstill.storage import collect_garbage

    print(collect_garbage(arguments.store, dry_run=not arguments.force).format())
    return DONE


def _gc_arguments(parser: argparse.ArgumentParser) -> None:
    _store_argument(parser)
    parser.add_argument("--force", action="store_true", help="remove the files; without it they are only listed")


GC = Command(
    name="gc",
    summary="remove what killed workers have left in a sealed store",
    description="List the files of a sealed store that its manifest does not name: attempts that lost a race or were "
    "killed, temporary files. With --force remove them.",
    examples=("potstill gc targets/train", "potstill gc targets/train --force"),
    add_arguments=_gc_arguments,
    run=_gc,
)
