"""The tokens store of foreign targets: each record is a row as it stands, with the bounds of its documents."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potstill.common.config import inside
from potstill.common.errors import UserError
from potstill.common.progress import Progress
from potstill.storage import RunSpec, StoreReader, TokensRow
from potstill.teacher_dump.documents import BadRecords, Place
from potstill.teacher_dump.importing.foreign_records import ForeignRecord, FoundRecord, SourceFacts, TargetsSource
from potstill.teacher_dump.importing.foreign_rows import tokens_row
from potstill.teacher_dump.importing.record_units import RecordUnits
from potstill.teacher_dump.importing.targets_config import ImportTargetsConfig
from potstill.teacher_dump.kept_tokenizer import KeptTokenizer
from potstill.teacher_dump.records.base import BadRecord
from potstill.teacher_dump.tokenizer import TextEncoder

log = logging.getLogger(__name__)

TOKENS, TOKENIZER = "tokens", "tokenizer"
UNIT_TOKENS = 1 << 18  # as many as 256 rows of 1024: the entries of a unit are in memory at once


@dataclass(frozen=True)
class OwnRow:
    """A record and the row that its tokens make, or why they make none; `used` bool [n]: its tokens that are in it."""

    found: FoundRecord
    row: TokensRow | BadRecord
    used: np.ndarray | None = None


def own_rows(
    source: TargetsSource, start: Place, *, entries: bool, vocab_size: int, row_length: int, first_row: int = 0
) -> Iterator[OwnRow]:
    """Every record from `start` on with its row; rows are numbered from `first_row` on."""
    number = first_row
    for found in source.read(start, entries=entries):
        if isinstance(found.record, BadRecord):
            yield OwnRow(found, found.record)
            continue
        try:
            row, used = tokens_row(found.record, number, vocab_size=vocab_size, row_length=row_length)
        except BadRecord as reason:
            yield OwnRow(found, reason)
            continue
        number += 1
        yield OwnRow(found, row, used)


def longest_row(source: TargetsSource) -> int:
    """Tokens of the longest record, padding left out. A pass over the tokens of all records."""
    longest = 0
    for found in source.read(Place(0, 0), entries=False):
        if isinstance(found.record, ForeignRecord) and found.record.tokens is not None:
            segments = found.record.segments
            longest = max(longest, len(found.record.tokens) if segments is None else int((segments != 0).sum()))
    if longest < 1:
        raise UserError("the input holds no record with tokens; check --tokens-column and --attention-column")
    return longest


def write_tokens(
    config: ImportTargetsConfig, source: TargetsSource, encoder: TextEncoder, *, row_length: int
) -> tuple[StoreReader, int]:
    """The sealed tokens store of all records, and how many were left out because their tokens are broken.

    Raises UserError when more records than `max_bad_lines` are broken, or none makes a row.
    """
    output = inside(config.output, TOKENS)
    spec = tokens_spec(config, source.facts, encoder, row_length=row_length)
    units = RecordUnits(output, spec, force=config.force)
    kept = None
    if isinstance(config.output, Path):
        # Beside the store, where export and evaluation look for it.
        kept = KeptTokenizer(encoder, config.output / TOKENIZER, force=config.force)
        kept.place()
    try:
        if not units.complete:
            _fill(config, source, units)
    except BaseException:
        if kept is not None and not units.begun:
            kept.withdraw()
        raise
    if kept is not None:
        kept.settle()
    return units.seal(), units.bad_records


def tokens_spec(config: ImportTargetsConfig, facts: SourceFacts, encoder: TextEncoder, *, row_length: int) -> RunSpec:
    return RunSpec(
        kind="tokens",
        row_length=row_length,
        rows_per_unit=config.rows_per_unit or max(1, UNIT_TOKENS // row_length),
        num_rows=None,
        vocab_size=encoder.vocab_size,
        tokenizer_digest=encoder.digest,
        info={"input": source_info(facts)},
    )


def source_info(facts: SourceFacts) -> Mapping[str, Any]:
    """What run.json keeps of the files: format, digest, the settings of their writer."""
    return {
        "format": facts.format,
        "digest": facts.digest,
        "files": facts.num_files,
        "bytes": facts.num_bytes,
        "settings": dict(facts.settings),
    }


def _fill(config: ImportTargetsConfig, source: TargetsSource, units: RecordUnits) -> None:
    spec = units.spec
    bad = BadRecords(allowed=config.max_bad_lines, before=units.bad_records)
    pending: list[TokensRow] = []
    # As of the last pending row: what the record of their unit says.
    place, bad_before = units.place, bad.count
    total = source.facts.num_records
    with Progress(total, done=units.rows, unit="rows", description="import tokens") as progress:
        for own in own_rows(
            source,
            units.place,
            entries=False,
            vocab_size=spec.vocab_size,
            row_length=spec.row_length,
            first_row=units.rows,
        ):
            if isinstance(own.row, BadRecord):
                bad.add(own.found.where, str(own.row))
                continue
            # A unit is committed only when a next row shows that it was not the last one.
            if len(pending) == spec.rows_per_unit:
                units.commit(pending, next_place=place, bad_records=bad_before, end=False)
                pending = []
            pending.append(own.row)
            place, bad_before = own.found.next_place, bad.count
            progress.update(1)
    if not pending:
        raise UserError(f"{units.path}: no record of the input makes a row ({bad.count} broken records skipped)")
    units.commit(pending, next_place=place, bad_records=bad.count, end=True)
