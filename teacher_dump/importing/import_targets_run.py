"""The run of `import targets`: tokens first, where they come from the files, then targets, unit by unit.

Both stores are written in the order of the records. Each commit record carries the place of the next record and what
was counted so far, so that a killed run continues there and its stores are equal to the bit.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from potstill.common.config import inside
from potstill.common.errors import UserError
from potstill.common.progress import Progress
from potstill.storage import MismatchError, RunSpec, StoreReader, TargetsRow, TokensRow, check_output
from potstill.storage.rows.k_bound import MAX_K
from potstill.teacher_dump.documents import BadRecords, Place
from potstill.teacher_dump.importing.first_records import FirstLook, Joined, look_at
from potstill.teacher_dump.importing.foreign_records import FoundRecord, TargetsSource
from potstill.teacher_dump.importing.foreign_rows import STATS, row_without_targets, targets_row, tokens_row
from potstill.teacher_dump.importing.foreign_tokens import TOKENS, longest_row, own_rows, source_info, write_tokens
from potstill.teacher_dump.importing.import_targets_summary import ImportTargetsSummary
from potstill.teacher_dump.importing.record_units import RecordUnits
from potstill.teacher_dump.importing.target_formats import TARGET_FORMATS
from potstill.teacher_dump.importing.targets_config import ImportTargetsConfig
from potstill.teacher_dump.records.base import BadRecord
from potstill.teacher_dump.tokenizer import TextEncoder, text_encoder

log = logging.getLogger(__name__)

TARGETS = "targets"
# No foreign format holds what these columns say, so the store has none of them.
_NEVER_HELD = "the entropy over the vocabulary, and the probability and rank of labels that are not among the entries"


def run_import(config: ImportTargetsConfig) -> ImportTargetsSummary:
    """See potstill.teacher_dump.importing.targets.import_targets."""
    started = time.monotonic()
    for part in (TARGETS,) if config.tokens is not None else (TOKENS, TARGETS):
        check_output(inside(config.output, part))
    source = open_source(config)
    _check_width(source, config)
    bad_records = 0
    if config.tokens is not None:
        tokens = _given_tokens(config.tokens, source)
        look = look_at(_with_given(source, tokens), source.facts, config, vocab_size=tokens.spec.vocab_size)
    else:
        assert config.tokenizer is not None
        if not source.facts.has_tokens:
            raise UserError(
                f"{source.facts.format} files hold no tokens: name the store of the same sequences as --tokens (row r "
                "is their sequence r), and leave tokenizer out"
            )
        encoder = text_encoder(config.tokenizer, append_eos=False, add_bos=False)
        row_length = config.row_length or longest_row(source)
        look = look_at(_with_own(source, encoder, row_length), source.facts, config, vocab_size=encoder.vocab_size)
        tokens, bad_records = write_tokens(config, source, encoder, row_length=row_length)
    units = RecordUnits(
        inside(config.output, TARGETS),
        targets_spec(config, source, tokens, look),
        force=config.force,
        bad_records=bad_records,
    )
    _fill(config, source, tokens, look, units)
    sealed = units.seal()
    return ImportTargetsSummary(
        source_format=source.facts.format,
        tokens=tokens.url,
        targets=sealed.url,
        rows=units.rows,
        normaliser=look.reading.normaliser,
        figures=units.figures,
        bytes_per_token=sealed.manifest.num_bytes / max(1, sealed.num_tokens),
        source_bytes_per_token=source.facts.num_bytes / max(1, sealed.num_tokens),
        bad_records=units.bad_records,
        resumed_rows=units.resumed_rows,
        seconds=time.monotonic() - started,
        lost=(*source.facts.lost, _NEVER_HELD),
        notes=look.notes,
    )


def open_source(config: ImportTargetsConfig) -> TargetsSource:
    """The input, by the format that is named or the first that knows it. Raises UserError where none does."""
    names = list(TARGET_FORMATS) if config.format is None else [config.format]
    for name in names:
        module = importlib.import_module(TARGET_FORMATS[name].module)
        if config.format is not None or module.recognises(config.input):
            source: TargetsSource = module.open_source(config)
            return source
    raise UserError(f"input {config.input[0]!r} is of no known format ({', '.join(TARGET_FORMATS)}); set --format")


def targets_spec(config: ImportTargetsConfig, source: TargetsSource, tokens: StoreReader, look: FirstLook) -> RunSpec:
    """run.json of the targets store: the settings of the files, what they have lost, figures of the first records."""
    facts, reading = source.facts, look.reading
    return RunSpec(
        kind="targets",
        row_length=tokens.spec.row_length,
        rows_per_unit=tokens.spec.rows_per_unit,
        num_rows=tokens.num_rows,
        vocab_size=tokens.spec.vocab_size,
        tokenizer_digest=tokens.spec.tokenizer_digest,
        input_digest=tokens.digest,
        selection={**facts.selection, "k": reading.k},
        stats=STATS[reading.normaliser],
        teacher={"id": config.teacher, "engine": "import"},
        info={
            "input": source_info(facts),
            "values": reading.kind,
            "lost": [*facts.lost, _NEVER_HELD],
            # Rounded: another machine may add in another order, and must find the same run.
            "first_records": {name: round(value, 3) for name, value in look.figures.to_json().items()},
        },
        normaliser=reading.normaliser,
    )


def _check_width(source: TargetsSource, config: ImportTargetsConfig) -> None:
    found = int(source.facts.selection["k"])
    if found > MAX_K and config.k is None:
        raise UserError(
            f"the files hold {found} entries of a position, a store {MAX_K} at most: set --k to keep the best of them; "
            "the mass of the others goes to the tail"
        )


def _given_tokens(place: str, source: TargetsSource) -> StoreReader:
    tokens = StoreReader(place)
    if tokens.spec.kind != "tokens":
        raise MismatchError(f"{tokens.url} is a {tokens.spec.kind} store, expected tokens")
    found = source.facts.num_records
    if found is not None and found != tokens.num_rows:
        raise MismatchError(
            f"{tokens.url} holds {tokens.num_rows} rows, the files {found} records; expected one record for each row"
        )
    return tokens


def _with_given(source: TargetsSource, tokens: StoreReader) -> Iterator[Joined]:
    for number, found in enumerate(source.read(Place(0, 0), entries=True)):
        if number >= tokens.num_rows:
            return
        joined = _join(found, tokens.tokens_rows([number])[0], own=False)
        if isinstance(joined, Joined):
            yield joined


def _with_own(source: TargetsSource, encoder: TextEncoder, row_length: int) -> Iterator[Joined]:
    for own in own_rows(source, Place(0, 0), entries=True, vocab_size=encoder.vocab_size, row_length=row_length):
        if isinstance(own.row, TokensRow):
            joined = _join(own.found, own.row, own=True)
            if isinstance(joined, Joined):
                yield joined


def _fill(
    config: ImportTargetsConfig, source: TargetsSource, tokens: StoreReader, look: FirstLook, units: RecordUnits
) -> None:
    """Write the units that are missing. Raises UserError where the files hold fewer or more records than rows."""
    own = config.tokens is None
    bad = BadRecords(allowed=config.max_bad_lines, before=units.bad_records)
    records = _with_rows(source, units.place, tokens) if own else source.read(units.place, entries=True)
    per_unit = tokens.spec.rows_per_unit
    with Progress(tokens.num_rows, done=units.rows, unit="rows", description="import targets") as progress:
        while units.rows < tokens.num_rows:
            done: list[TargetsRow] = []
            next_place = units.place
            for row in tokens.tokens_rows(range(units.rows, min(units.rows + per_unit, tokens.num_rows))):
                found = next(records, None)
                if found is None:
                    raise UserError(
                        f"the files end before row {row.row}: {tokens.url} holds {tokens.num_rows} rows; expected one "
                        "record for each row"
                    )
                done.append(_targets(found, row, look, units, bad, own=own))
                next_place = found.next_place
            end = units.rows + len(done) == tokens.num_rows
            units.commit(done, next_place=next_place, bad_records=bad.count, end=end)
            progress.update(len(done))
    more = next(iter(itertools.islice(records, 1)), None)
    if more is not None:
        raise UserError(
            f"{more.where}: more records than the {tokens.num_rows} rows of {tokens.url}; expected one for each"
        )


def _with_rows(source: TargetsSource, start: Place, tokens: StoreReader) -> Iterator[FoundRecord]:
    """The records that have made a row of the tokens store."""
    spec = tokens.spec
    own = own_rows(source, start, entries=True, vocab_size=spec.vocab_size, row_length=spec.row_length)
    return (one.found for one in own if isinstance(one.row, TokensRow))


def _targets(
    found: FoundRecord, row: TokensRow, look: FirstLook, units: RecordUnits, bad: BadRecords, *, own: bool
) -> TargetsRow:
    """The targets of a row; a row without any where its record is broken, which is counted."""
    joined = _join(found, row, own=own)
    try:
        if isinstance(joined, BadRecord):
            raise joined
        made, figures = targets_row(joined.row, joined.entries, joined.used, look.reading)
    except BadRecord as reason:
        bad.add(f"{found.where} (row {row.row})", f"{reason}; its row would have no targets")
        units.figures.without_targets += 1
        return row_without_targets(row, look.reading)
    units.figures.add(figures)
    return made


def _join(found: FoundRecord, row: TokensRow, *, own: bool) -> Joined | BadRecord:
    """A record beside its row. Raises MismatchError where the tokens of the two differ, or their documents."""
    record = found.record
    if isinstance(record, BadRecord):
        return record
    used: np.ndarray | None = None
    if record.tokens is not None:
        length = len(row.tokens) if own else max(len(record.tokens), 1)
        try:
            theirs, used = tokens_row(record, row.row, vocab_size=1 << 62, row_length=length)
        except BadRecord as reason:
            return reason
        _check_same(found, row, theirs, has_segments=record.segments is not None)
    if not isinstance(record.entries, BadRecord) and record.entries is not None:
        return Joined(row, record.entries, used)
    return record.entries if record.entries is not None else BadRecord("it has no entries")


def _check_same(found: FoundRecord, row: TokensRow, theirs: TokensRow, *, has_segments: bool) -> None:
    wrong: Any = None
    if not np.array_equal(theirs.tokens, row.tokens):
        size = min(len(theirs.tokens), len(row.tokens))
        differing = np.flatnonzero(theirs.tokens[:size] != row.tokens[:size])
        first = int(differing[0]) if len(differing) else size
        wrong = f"token {first} differs ({len(theirs.tokens)} tokens, the row has {len(row.tokens)})"
    elif has_segments and not np.array_equal(theirs.doc_lens, row.doc_lens):
        wrong = (
            f"its documents have {theirs.doc_lens[:5].tolist()} tokens, those of the row {row.doc_lens[:5].tolist()}"
        )
    if wrong is not None:
        raise MismatchError(
            f"{found.where} is not row {row.row} of the tokens store: {wrong}; row r must be sequence r of the files, "
            "with the documents that the teacher read"
        )
