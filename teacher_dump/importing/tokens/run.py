"""import tokens: ids that another program wrote -> tokens stores of packed rows, `train/` and `heldout/`.

As `prepare` does from text: one pass in the order of the input, memory for a few documents and one unit of rows per
store (a document of a flat array is a view of the file), and a cursor in each commit record, so that a killed run
continues there and its stores are equal to the bit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.common.config import inside
from potstill.common.errors import UserError
from potstill.common.model_place import TOKENIZER_FILES, find_model
from potstill.common.progress import Progress
from potstill.storage import RunSpec, check_output
from potstill.teacher_dump.held_output import held_output
from potstill.teacher_dump.importing.format_options import check_options
from potstill.teacher_dump.importing.tokens.base import Ids, Reading
from potstill.teacher_dump.importing.tokens.config import ImportTokensConfig
from potstill.teacher_dump.importing.tokens.formats import TOKEN_FORMATS
from potstill.teacher_dump.importing.tokens.search import FoundFile, find_token_files
from potstill.teacher_dump.importing.tokens.source import PARTS, TokenDocument, TokenSource
from potstill.teacher_dump.prepared import MASK_COLUMN, Output, check_untrained
from potstill.teacher_dump.split import Split
from potstill.teacher_dump.tokenizer import TextEncoder, context_limit, text_encoder
from potstill.teacher_dump.train_and_heldout import (
    HELDOUT,
    TRAIN,
    PrepareSummary,
    bad_lines_of_all,
    copy_beside,
    finish_all,
    place_copy,
    where_to_begin,
)

log = logging.getLogger(__name__)

_PROGRESS_BYTES = 1 << 20


def import_tokens(config: ImportTokensConfig) -> PrepareSummary:
    """Pack the ids of `config.input` into sealed tokens stores under `config.output`.

    After a kill the same call continues; after the end it does nothing. A run that fails before its first unit
    of rows leaves nothing at the output. Raises UserError for bad input, or while another run writes there, and
    StoreError for trouble with the stores.
    """
    found = find_token_files(config.input, config.format)
    check_options(TOKEN_FORMATS, found[0].format, dict(config))
    parts = (TRAIN, HELDOUT) if config.heldout_fraction or config.heldout_documents else (TRAIN,)
    for part in parts:
        check_output(inside(config.output, part))
    with held_output(config.output, stores=(TRAIN, HELDOUT)):
        return _import(config, found, parts)


def _import(config: ImportTokensConfig, found: Sequence[FoundFile], parts: tuple[str, ...]) -> PrepareSummary:
    started = time.monotonic()
    find_model(config.tokenizer, what="tokenizer", files=TOKENIZER_FILES)
    encoder = text_encoder(config.tokenizer, append_eos=False, add_bos=False)
    reading = _reading(config, encoder)
    longest = config.row_length if config.packing == "rows" else None
    source = TokenSource(found, reading, longest=longest, max_bad_lines=config.max_bad_lines)
    _note_settings(config, source, encoder)
    split = _make_split(config, source)
    kept = copy_beside(config.output, config.tokenizer, encoder, force=config.force)
    spec = _run_spec(config, source, encoder, split)
    outputs = {
        name: Output(
            inside(config.output, name),
            spec(name),
            force=config.force,
            tokenizer=kept,
            packing=config.packing,
            window=config.packing_window,
            too_long=_too_long(config, source),
            parts=PARTS,
        )
        for name in parts
    }
    place_copy(kept, outputs)
    bad_lines = _fill(config, source, split, outputs)
    allowed = config.max_untrained_fraction
    stores = finish_all(outputs, num_files=source.num_files, bad_lines=bad_lines, allowed=allowed, word="tokens")
    return PrepareSummary(
        stores=tuple(stores),
        source_format=found[0].format,
        tokenizer=config.tokenizer,
        tokenizer_digest=encoder.digest,
        vocab_size=encoder.vocab_size,
        num_files=source.num_files,
        input_bytes=source.num_bytes,
        bad_lines=bad_lines,
        resumed_rows=sum(output.resumed_rows for output in outputs.values()),
        seconds=time.monotonic() - started,
        notes=tuple(source.notes),
    )


def _reading(config: ImportTokensConfig, encoder: TextEncoder) -> Reading:
    """The options of reading, with what the tokenizer says. UserError where an end token is needed and unknown."""
    end_token = config.end_token
    if end_token is None and (eos := encoder.tokenizer.eos_token_id) is not None:
        end_token = int(eos)
    if end_token is None and (config.bounds == "end_token" or config.append_eos):
        wanted = "append_eos" if config.append_eos else "bounds end_token"
        raise UserError(
            f"tokenizer {config.tokenizer!r} has no eos token, and {wanted} needs one; name it (--end-token)"
        )
    if end_token is not None and end_token >= encoder.vocab_size:
        raise UserError(
            f"end_token {end_token} is no id of tokenizer {config.tokenizer!r} ({encoder.vocab_size} entries)"
        )
    return Reading(
        vocab_size=encoder.vocab_size,
        end_token=end_token,
        bounds=config.bounds,
        dtype=config.dtype,
        ids_column=config.ids_column,
        mask_column=config.mask_column,
        attention_column=config.attention_column,
    )


def _note_settings(config: ImportTokensConfig, source: TokenSource, encoder: TextEncoder) -> None:
    """Say what has no effect, and what a later stage would refuse: rows longer than the tokenizer's model reads."""
    if config.end_token is not None and not (config.append_eos or source.cuts_at_end_token):
        source.note(f"end_token {config.end_token} is not used: documents end as the files say (--bounds end_token)")
    limit = context_limit(config.tokenizer, encoder.tokenizer)
    if limit is not None and config.row_length > limit[0]:
        source.note(
            f"row_length {config.row_length} exceeds the {limit[0]} positions that the model of tokenizer "
            f"{config.tokenizer} reads ({limit[1]}): dump and score refuse these rows with that model"
        )


def _make_split(config: ImportTokensConfig, source: TokenSource) -> Split:
    if config.heldout_documents:
        keys = (document.key() for document in source.read() if len(document.ids))
        return Split.by_count(keys, count=config.heldout_documents, salt=config.split_salt)
    return Split.by_fraction(config.heldout_fraction, salt=config.split_salt)


def _too_long(config: ImportTokensConfig, source: TokenSource) -> str:
    # As prepare does: a piece of an answer without its prompt is no text.
    return config.too_long or ("cut" if source.has_mask else "split")


def _run_spec(
    config: ImportTokensConfig, source: TokenSource, encoder: TextEncoder, split: Split
) -> Callable[[str], RunSpec]:
    packing = {"rule": config.packing, "window": config.packing_window, "too_long": _too_long(config, source)}

    def spec(part: str) -> RunSpec:
        info: dict[str, Any] = {
            "part": part,
            "input": dict(source.info),
            "end_token": source.reading.end_token,
            "append_eos": config.append_eos,
            "split": {"threshold": str(split.threshold), "salt": split.salt},
        }
        if config.packing != "cut":
            info["packing"] = packing
        return RunSpec(
            kind="tokens",
            row_length=config.row_length,
            rows_per_unit=config.rows_per_unit,
            num_rows=None,
            vocab_size=encoder.vocab_size,
            tokenizer_digest=encoder.digest,
            columns=(MASK_COLUMN,) if source.has_mask else (),
            info=info,
        )

    return spec


def _fill(config: ImportTokensConfig, source: TokenSource, split: Split, outputs: dict[str, Output]) -> int:
    """Read from the earliest cursor to the end; returns the number of broken records over the whole input."""
    finished = bad_lines_of_all(outputs)
    if finished is not None:
        return finished
    start, bad_before, continues = where_to_begin(outputs)
    if continues:
        log.info(
            "import continues at file %d of %d, record %d", start.file + 1, source.num_files, start.record // PARTS + 1
        )
    reader = source.read(start=start, bad_lines=bad_before)
    end = source.reading.end_token if config.append_eos else None
    total = source.num_bytes
    with Progress(total or None, unit="bytes", description="import") as progress:
        for document in reader:
            held_out = split.threshold > 0 and split.held_out(document.key())
            output = outputs[HELDOUT if held_out else TRAIN]
            if output.wants(document.place):
                ids, mask = _ended(document, end)
                output.add(document.place, ids, mask, bad_lines=document.bad_lines)
            if reader.bytes_read - progress.done >= _PROGRESS_BYTES:
                progress.update(min(reader.bytes_read, total) - progress.done)
                progress.note(rows=sum(one.rows for one in outputs.values()))
                check_untrained(list(outputs.values()), allowed=config.max_untrained_fraction)
        progress.update(max(0, total - progress.done))
    return reader.bad_lines


def _ended(document: TokenDocument, end: int | None) -> tuple[Ids, NDArray[np.bool_] | None]:
    """Ids and mask with the end token after them, unless it stands there; it is trained on as the last token is."""
    ids, mask = document.ids, document.mask
    if end is None or not len(ids) or ids[-1] == end:
        return ids, mask
    # As int32, because the file's own type may be too narrow for it.
    return np.append(ids.astype(np.int32), np.int32(end)), None if mask is None else np.append(mask, mask[-1])
