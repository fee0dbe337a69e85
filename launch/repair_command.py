"""`potstill repair`: take damaged units out of a store, and say or run what makes them again."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.common.exit_codes import DONE, INCOMPLETE
from potstill.common.options import parse_arguments
from potstill.common.progress import Progress
from potstill.launch.command import Command
from potstill.launch.import_commands import IMPORT
from potstill.launch.parser import build_parser
from potstill.launch.rollout_command import ROLLOUT
from potstill.launch.store_makers import Maker, command_line, config_for, maker_of, what_it_is
from potstill.launch.teacher_commands import DUMP, PREPARE, SCORE

if TYPE_CHECKING:
    from potstill.storage import RepairReport

log = logging.getLogger("potstill.launch.repair")
_WRITERS = (PREPARE, IMPORT, DUMP, SCORE, ROLLOUT)
_SHOWN = 20


def _repair(arguments: argparse.Namespace) -> int:
    from potstill.storage import CorruptError, read_spec

    store, config = arguments.store, arguments.with_config
    if config is not None:
        with contextlib.suppress(CorruptError):  # of run.json, which repair answers
            config_for(maker_of(read_spec(store)), config, store)  # now, while the store is as it was
    report = _repaired(store, dry_run=arguments.dry_run)
    maker = maker_of(report.spec)
    beside = _repair_beside(report, dry_run=arguments.dry_run)
    steps = next_steps(report, maker, config)
    if arguments.json:
        print(json.dumps({**report.to_json(), "next": steps}), flush=True)
    else:
        print("\n".join(_lines(report, maker, steps, beside=beside, config=config)), flush=True)
    if report.whole:
        return DONE
    if config is None or arguments.dry_run or not steps:
        return INCOMPLETE
    # With --json, standard output holds that one object.
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        return _run(maker, config)


def _repaired(store: str, *, dry_run: bool, also: Collection[int] = ()) -> RepairReport:
    from potstill.storage import repair_store

    with Progress(None, unit="rows", description="repair") as progress:
        report = repair_store(store, dry_run=dry_run, progress=progress.update, also=also)
    return report


def _repair_beside(report: RepairReport, *, dry_run: bool) -> RepairReport | None:
    """Answers of a rollout are made together with its scores: a unit that one store lacks is taken out of the other."""
    if report.spec.info.get("part") != "answers" or not report.missing:
        return None
    return _repaired(f"{report.url.rpartition('/')[0]}/scores", dry_run=dry_run, also=report.missing)


def next_steps(report: RepairReport, maker: Maker, config: Path | None) -> list[str]:
    """The command lines that make the store whole, in order; none where it is, or where they would not help."""
    if report.whole or (report.beyond_repair and len(report.beyond_repair) == len(report.findings)):
        return []
    if config is not None:
        return [f"potstill {maker.name} --config {config}"]
    if not report.redo and report.missing == ():
        return [f"potstill seal {report.url}"]
    return [command_line(maker, report.spec, report.url)]


def _lines(
    report: RepairReport, maker: Maker, steps: list[str], *, beside: RepairReport | None, config: Path | None
) -> list[str]:
    if report.whole:
        return [f"{report.url}: sealed and sound, nothing to repair"]
    lines = [f"{report.url}: {len(report.findings)} parts are damaged"] if report.findings else []
    lines += [f"  {finding.text}" for finding in report.findings[:_SHOWN]]
    lines += [f"  and {len(report.findings) - _SHOWN} more (--json lists all)"] if len(report.findings) > _SHOWN else []
    if report.moved:
        verb = "would move" if report.dry_run else "moved"
        lines.append(f"{verb} {len(report.moved)} files to {report.url}/quarantine; nothing is deleted")
    if not report.findings:
        lines.append(f"{report.url}: what is there is sound, but the store is not sealed")
    if report.redo:
        lines.append(f"to be made again: {len(report.redo)} units {_listed(report.redo)}")
    lines += [
        f"not repaired: {finding.text}; write the store again at another place" for finding in report.beyond_repair
    ]
    if beside is not None and beside.redo:
        lines.append(f"{beside.url}: units {_listed(beside.redo)} are taken out too, as one command makes both stores")
    if steps:
        lines += ["run next:", *(f"  {step}" for step in steps)]
        if config is None and not steps[0].startswith("potstill seal"):
            lines += [f"  ({line})" for line in what_it_is(report.spec)]
            lines.append(
                f"  (or the {maker.name} command that wrote the store, as it was: run.json pins what decides the bytes "
                "and refuses another)"
            )
    return lines


def _listed(units: tuple[int, ...]) -> str:
    return f"{list(units[:_SHOWN])}"[:-1] + (", ...]" if len(units) > _SHOWN else "]")


def _run(maker: Maker, config: Path) -> int:
    """The command that wrote the store, with its configuration; its exit code."""
    words = [*maker.words, "--config", str(config)]
    log.info("running: potstill %s", " ".join(words))
    arguments = parse_arguments(build_parser(_WRITERS, maker.words[0]), words)
    code: int = arguments.run(arguments)
    return code


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="folder of a tokens, targets or scores store")
    parser.add_argument("--dry-run", action="store_true", help="say what would be moved and run; change nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--with",
        dest="with_config",
        type=Path,
        metavar="CONFIG.yaml",
        help="configuration of the command that wrote the store (dump, prepare, score, rollout, import): run it after",
    )


REPAIR = Command(
    name="repair",
    summary="take damaged units out of a store, to be made again",
    description="Read every byte and row of a store. What is damaged, missing or short is moved to quarantine/ inside "
    "the store, never deleted; the store is unsealed, and the command to run next is printed, or run with --with. It "
    "makes only the missing units, and the store has the digest of the undamaged one again. Killed at any moment, the "
    "same command finishes. Ends with 0 when the store is sealed and sound, with 3 while something is left to run.",
    examples=(
        "potstill repair data/targets --dry-run",
        "potstill repair data/targets",
        "potstill repair data/targets --with dump.yaml",
    ),
    add_arguments=_arguments,
    run=_repair,
)
