"""import tokens: ids that another program wrote -> tokens stores of packed rows, `train/` and `heldout/`.

As `prepare` does from text: one pass in the order of the input, memory for a few documents and one unit of rows per
store (a document of a flat array is a view of the file), and a cursor in each commit record, so that a killed run
continues there and its stores are equal to the bit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.common.config import inside
from potstill.common.errors import UserError
from potstill.common.model_place import TOKENIZER_FILES, find_model
from potstill.common.progress import Progress, format_seconds
from potstill.storage import RunSpec, check_output
from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.importing.token_file import Ids, Reading
from potstill.teacher_dump.importing.token_formats import FORMAT_OPTIONS, TOKEN_FORMATS
from potstill.teacher_dump.importing.token_search import find_token_files
from potstill.teacher_dump.importing.token_source import PARTS, TokenDocument, TokenSource
from potstill.teacher_dump.importing.tokens_config import ImportTokensConfig
from potstill.teacher_dump.kept_tokenizer import KeptTokenizer
from potstill.teacher_dump.prepared import MASK_COLUMN, Output, StoreSummary, check_untrained
from potstill.teacher_dump.split import Split
from potstill.teacher_dump.tokenizer import TextEncoder, context_limit, text_encoder

log = logging.getLogger(__name__)

TRAIN, HELDOUT = "train", "heldout"
_PROGRESS_BYTES = 1 << 20


@dataclass(frozen=True)
class ImportSummary:
    """What `import tokens` has made; `resumed_rows` were there from an earlier run."""

    stores: tuple[StoreSummary, ...]
    source_format: str
    tokenizer: str
    tokenizer_digest: str
    vocab_size: int
    num_files: int
    input_bytes: int
    bad_lines: int
    resumed_rows: int
    seconds: float
    notes: tuple[str, ...] = ()

    def format(self) -> str:
        """A few lines for a person."""
        lines = [line for store in self.stores for line in store.format()]
        lines.append(f"tokenizer: {self.tokenizer} ({self.vocab_size} entries, digest {self.tokenizer_digest[:12]})")
        lines.append(
            f"read {self.num_files} files of format {self.source_format}, {self.input_bytes / 1e6:.1f} MB in "
            f"{format_seconds(self.seconds)}; {self.bad_lines} broken records skipped; {self.resumed_rows} rows were "
            "there from an earlier run"
        )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def import_tokens(config: ImportTokensConfig) -> ImportSummary:
    """Pack the ids of `config.input` into sealed tokens stores under `config.output`.

    After a kill the same call continues; after the end it does nothing. A run that fails before its first unit
    of rows leaves nothing at the output. Raises UserError for bad input and StoreError for trouble with the stores.
    """
    started = time.monotonic()
    found = find_token_files(config.input, config.format)
    _check_options(config, found[0].format)
    parts = (TRAIN, HELDOUT) if config.heldout_fraction or config.heldout_documents else (TRAIN,)
    for part in parts:
        check_output(inside(config.output, part))
    find_model(config.tokenizer, what="tokenizer", files=TOKENIZER_FILES)
    encoder = text_encoder(config.tokenizer, append_eos=False, add_bos=False)
    reading = _reading(config, encoder)
    longest = config.row_length if config.packing == "rows" else None
    source = TokenSource(found, reading, longest=longest, max_bad_lines=config.max_bad_lines)
    _note_context(config, source, encoder)
    split = _make_split(config, source)
    kept = _kept_tokenizer(config, encoder)
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
    if kept is not None and any(output.begun for output in outputs.values()):
        kept.place()  # somebody has deleted it since
    bad_lines = _fill(config, source, split, outputs)
    for output in outputs.values():
        output.close(Place(source.num_files, 0), bad_lines=bad_lines)
    check_untrained(list(outputs.values()), allowed=config.max_untrained_fraction, at_end=True)
    for output in outputs.values():
        if output.empty:
            raise UserError(_nothing_in(str(output.path), bad_lines))
    stores = [output.finish(bad_lines=bad_lines) for output in outputs.values()]
    for output in outputs.values():
        output.seal()
    return ImportSummary(
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


def _check_options(config: ImportTokensConfig, name: str) -> None:
    """Refuse settings that the format does not know, which would be without effect."""
    known = TOKEN_FORMATS[name].options
    alien = [option for option in FORMAT_OPTIONS if getattr(config, option) is not None and option not in known]
    if alien:
        raise UserError(
            f"format {name} has no use for {' and '.join(alien)}; leave it out, or name the format (--format)"
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


def _note_context(config: ImportTokensConfig, source: TokenSource, encoder: TextEncoder) -> None:
    """Say now what a later stage would refuse: rows longer than the model of the tokenizer reads."""
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


def _kept_tokenizer(config: ImportTokensConfig, encoder: TextEncoder) -> KeptTokenizer | None:
    """The copy beside the stores; None where it is the one that was named, or the output is no folder."""
    folder = Path(config.output) / "tokenizer"
    itself = folder.is_dir() and Path(config.tokenizer).is_dir() and folder.samefile(config.tokenizer)
    if itself or not isinstance(config.output, Path):
        return None
    return KeptTokenizer(encoder, folder, force=config.force)


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
    open_outputs = [output for output in outputs.values() if not output.complete]
    if not open_outputs:
        return max(int(output.bad_lines or 0) for output in outputs.values())
    behind = min(open_outputs, key=lambda output: output.start.place if output.start else Place(0, 0))
    start = behind.start.place if behind.start else Place(0, 0)
    if behind.start:
        log.info(
            "import continues at file %d of %d, record %d", start.file + 1, source.num_files, start.record // PARTS + 1
        )
    reader = source.read(start=start, bad_lines=behind.start.bad_lines if behind.start else 0)
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


def _nothing_in(path: str, bad_lines: int) -> str:
    if path.rsplit("/", 1)[-1] == HELDOUT:
        return (
            f"{path}: no document fell into the held-out part; the input is too small for this heldout_fraction, raise "
            "it or set heldout_documents (with --force, if rows of the other part are written already)"
        )
    return f"{path}: the input holds no tokens to train on ({bad_lines} broken records skipped)"
