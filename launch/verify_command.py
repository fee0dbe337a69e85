"""verify: a store against its own checksums, and, with --teacher, against a live teacher."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.common.exit_codes import DONE, INCOMPLETE
from potstill.common.options import OVERRIDES, add_config_options, read_config
from potstill.common.progress import Progress
from potstill.launch.command import Command

if TYPE_CHECKING:
    from potstill.teacher_dump.against_teacher.report import TeacherReport

_TEACHER = "teacher.model"


def _verify(arguments: argparse.Namespace) -> int:
    from potstill.storage import rows_to_verify, signature_findings, verify_store

    teacher_asked = bool(getattr(arguments, OVERRIDES)) or arguments.config is not None
    # First: of a store that a stranger has made nothing else is read before it is known who it comes from.
    signature = () if arguments.key is None else signature_findings(arguments.store, arguments.key)
    with Progress(rows_to_verify(arguments.store), unit="rows", description="verify") as progress:
        report = verify_store(arguments.store, deep=arguments.deep, progress=progress.update, also=signature)
    as_json = {**report.to_json(), "signature_checked": arguments.key is not None}
    lines = [report.format()]
    if arguments.key is not None and not signature:
        lines.append(
            f"signed by a key of {arguments.key}" + ("" if arguments.deep else "; --deep holds the bytes against it")
        )
    ok = report.ok
    if teacher_asked and not ok:
        as_json["against_teacher"] = None
        lines.append("not held against the teacher: the store is not sound")
    elif teacher_asked:
        found = _against_teacher(arguments)
        if found is None:
            return DONE  # a rank that held a part of the teacher; the first one tells
        ok, as_json["against_teacher"] = found.ok, found.to_json()
        lines.append(found.format())
    if os.environ.get("RANK", "0") == "0":  # the ranks of a group all find the same
        print(json.dumps(as_json) if arguments.json else "\n".join(lines))
    return DONE if ok else INCOMPLETE


def _against_teacher(arguments: argparse.Namespace) -> TeacherReport | None:
    from potstill.teacher_dump.against_teacher.config import AgainstTeacherConfig
    from potstill.teacher_dump.against_teacher.run import hold_against_teacher

    return hold_against_teacher(arguments.store, read_config(AgainstTeacherConfig, arguments))


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    from potstill.teacher_dump.against_teacher.config import AgainstTeacherConfig

    parser.add_argument("store", help="folder of a tokens, targets or scores store")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--deep", action="store_true", help="read every byte and decode every row, not sizes only")
    parser.add_argument(
        "--key",
        type=Path,
        metavar="SIGNERS",
        help="see that the store is signed by one of these: a public ssh key, or an allowed-signers file of ssh-keygen",
    )
    flags = {f"--{key.replace('_', '-')}": f"teacher.{key}" for key in ("batch_rows", "dtype", "engine", "device")}
    add_config_options(parser, AgainstTeacherConfig, flags={"--teacher": _TEACHER, **flags})


VERIFY = Command(
    name="verify",
    summary="look for damage in a store, or hold it against its teacher",
    description="Check records, sizes, index and manifest; with --deep also every checksum and every row; with --key "
    "also the signature. One line for each unit that is damaged. Ends with 0 when the store is sound, else with 3.\n"
    "With --teacher also run some rows again, twice, in different batches: is what is stored as near to what the "
    "teacher says today as that is to itself? Ends with 3 where it is not. The other keys are of this check; what is "
    "not set of the teacher is as run.json of the store says.",
    examples=(
        "potstill verify data/targets",
        "potstill verify data/targets --deep --json",
        "potstill verify data/targets --deep --key teacher.pub",
        "potstill verify data/targets --teacher models/teacher --tokens data/train --rows 256",
    ),
    add_arguments=_verify_arguments,
    run=_verify,
)
