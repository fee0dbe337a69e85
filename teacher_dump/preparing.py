"""prepare: text files or a data set -> tokens stores of packed rows, `train/` and `heldout/`.

One pass in the order of the input; memory holds a few documents and one unit of rows per store. Each commit record
carries the cursor at its end, so that a killed run continues there and its stores are equal to the bit.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from potstill.common.config import inside
from potstill.common.model_place import TOKENIZER_FILES, find_model
from potstill.common.progress import Progress
from potstill.storage import RunSpec, check_output
from potstill.teacher_dump.config import PrepareConfig
from potstill.teacher_dump.documents import Document
from potstill.teacher_dump.held_output import held_output
from potstill.teacher_dump.kept_tokenizer import KeptTokenizer
from potstill.teacher_dump.prepared import MASK_COLUMN, Output, check_untrained
from potstill.teacher_dump.records.base import RecordKind, record_kind
from potstill.teacher_dump.records.table import RECORD_KINDS
from potstill.teacher_dump.sources import Documents, Source, open_source
from potstill.teacher_dump.split import Split
from potstill.teacher_dump.tokenizer import TextEncoder, context_limit, text_encoder, train_bpe, trained_already
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

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 256, 1 << 20


def prepare(config: PrepareConfig) -> PrepareSummary:
    """Tokenize and pack `config.input` into sealed tokens stores under `config.output`.

    After a kill the same call continues; after the end it does nothing. A run that fails before its first unit
    of rows leaves nothing at the output. Raises UserError for bad input, or while another run writes there, and
    StoreError for trouble with the stores.
    """
    _check_places(config)
    with held_output(config.output, stores=(TRAIN, HELDOUT)):
        return _prepare(config)


def _prepare(config: PrepareConfig) -> PrepareSummary:
    started = time.monotonic()
    kind = record_kind(config)
    source = open_source(config, kind)
    split = _make_split(config, source)
    with ExitStack() as stack:
        tokenizer, encoder, kept = _tokenizer(config, source, split, stack)
        notes = _notes(config, tokenizer, encoder)
        outputs = _outputs(config, _run_spec(config, source, kind, encoder, split), kind, split, kept)
        place_copy(kept, outputs)
        bad_lines = _fill(config, source, kind, split, encoder, outputs)
        allowed = config.max_untrained_fraction
        stores = finish_all(outputs, num_files=source.num_files, bad_lines=bad_lines, allowed=allowed, word="text")
    return PrepareSummary(
        stores=tuple(stores),
        tokenizer=tokenizer,
        tokenizer_digest=encoder.digest,
        vocab_size=encoder.vocab_size,
        num_files=source.num_files,
        input_bytes=source.num_bytes,
        bad_lines=bad_lines,
        resumed_rows=sum(output.resumed_rows for output in outputs.values()),
        seconds=time.monotonic() - started,
        notes=notes,
    )


def _check_places(config: PrepareConfig) -> None:
    """Refuse, before anything is read or loaded, an output that cannot be written and a tokenizer that is not there."""
    for part in (TRAIN, HELDOUT) if config.heldout_fraction or config.heldout_documents else (TRAIN,):
        check_output(inside(config.output, part))
    if config.tokenizer is not None:
        find_model(config.tokenizer, what="tokenizer", files=TOKENIZER_FILES)


def _notes(config: PrepareConfig, tokenizer: str, encoder: TextEncoder) -> tuple[str, ...]:
    """What a later stage would refuse, said now; each is logged as a warning and stands in the summary."""
    limit = None if config.train_tokenizer is not None else context_limit(tokenizer, encoder.tokenizer)
    if limit is None or config.row_length <= limit[0]:
        return ()
    positions, where = limit
    note = (
        f"row_length {config.row_length} exceeds the {positions} positions that the model of tokenizer {tokenizer} "
        f"reads ({where}): dump and score refuse these rows with that model; prepare with --row-length {positions} or "
        "less, unless another teacher reads them"
    )
    log.warning("%s", note)
    return (note,)


def _outputs(
    config: PrepareConfig, spec: Callable[[str], RunSpec], kind: RecordKind, split: Split, kept: KeptTokenizer | None
) -> dict[str, Output]:
    return {
        name: Output(
            inside(config.output, name),
            spec(name),
            force=config.force,
            tokenizer=kept,
            packing=config.packing,
            window=config.packing_window,
            too_long=_too_long(config, kind),
        )
        for name in ((TRAIN, HELDOUT) if split.threshold else (TRAIN,))
    }


def _too_long(config: PrepareConfig, kind: RecordKind) -> str:
    # A piece of an answer without its prompt teaches what no prompt asks for; a piece of a text is text.
    return config.too_long or ("cut" if kind.masked else "split")


def _make_split(config: PrepareConfig, source: Source) -> Split:
    if config.heldout_documents:
        texts = (document.record.key for document in source.read() if document.record.key)
        return Split.by_count(texts, count=config.heldout_documents, salt=config.split_salt)
    return Split.by_fraction(config.heldout_fraction, salt=config.split_salt)


def _tokenizer(
    config: PrepareConfig, source: Source, split: Split, stack: ExitStack
) -> tuple[str, TextEncoder, KeptTokenizer | None]:
    """Its name, the tokenizer with what goes round a document, and the copy to be placed beside the first rows.

    A tokenizer trained now lies in a temporary folder until then, which goes with `stack`.
    """
    folder = Path(config.output) / "tokenizer"
    # A chat template writes the ends of a conversation itself.
    default = not RECORD_KINDS[config.record_key].reads_template
    ends = {"append_eos": default if config.append_eos is None else config.append_eos, "add_bos": config.add_bos}
    if config.train_tokenizer is None:
        assert config.tokenizer is not None
        encoder = text_encoder(config.tokenizer, **ends)
        return config.tokenizer, encoder, copy_beside(config.output, config.tokenizer, encoder, force=config.force)
    settings = config.train_tokenizer
    if trained_already(folder, settings=settings, input_digest=source.digest, force=config.force):
        log.info("tokenizer %s is there already, trained on the same input", folder)
        return str(folder), text_encoder(str(folder), **ends), None
    trained = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="potstill_tokenizer_"))) / "tokenizer"
    reader = source.read()
    with Progress(source.num_bytes or None, unit="bytes", description="train tokenizer") as progress:

        def texts() -> Iterator[str]:
            for document in reader:
                progress.update(max(0, reader.bytes_read - progress.done))
                if not split.held_out(document.record.key):
                    yield document.record.text

        train_bpe(trained, texts(), settings=settings, input_digest=source.digest, force=False)
    encoder = text_encoder(str(trained), **ends)
    return str(folder), encoder, KeptTokenizer(encoder, folder, force=config.force, trained=trained)


def _run_spec(
    config: PrepareConfig, source: Source, kind: RecordKind, encoder: TextEncoder, split: Split
) -> Callable[[str], RunSpec]:
    packing = {"rule": config.packing, "window": config.packing_window, "too_long": _too_long(config, kind)}

    def spec(part: str) -> RunSpec:
        return RunSpec(
            kind="tokens",
            row_length=config.row_length,
            rows_per_unit=config.rows_per_unit,
            num_rows=None,
            vocab_size=encoder.vocab_size,
            tokenizer_digest=encoder.digest,
            columns=(MASK_COLUMN,) if kind.masked else (),
            info={
                "part": part,
                "input": {
                    "digest": source.digest,
                    "files": source.num_files,
                    "bytes": source.num_bytes,
                    **source.info(),
                },
                **kind.info(),
                "prefix": list(encoder.prefix),
                "suffix": list(encoder.suffix),
                "split": {"threshold": str(split.threshold), "salt": split.salt},
                **({"packing": packing} if config.packing != "cut" else {}),
            },
        )

    return spec


def _fill(
    config: PrepareConfig,
    source: Source,
    kind: RecordKind,
    split: Split,
    encoder: TextEncoder,
    outputs: dict[str, Output],
) -> int:
    """Read from the earliest cursor to the end; returns the number of broken records over the whole input."""
    finished = bad_lines_of_all(outputs)
    if finished is not None:
        return finished
    start, bad_before, continues = where_to_begin(outputs)
    if continues:
        log.info("prepare continues at file %d of %d, record %d", start.file + 1, source.num_files, start.record + 1)
    reader = source.read(start=start, bad_lines=bad_before)
    total = source.num_bytes
    with Progress(total or None, unit="bytes", description="prepare") as progress:
        for batch in _batches(reader):
            wanted = []
            for document in batch:
                output = outputs[HELDOUT if split.held_out(document.record.key) else TRAIN]
                if output.wants(document.place):
                    wanted.append((document, output))
            encoded = kind.encode(encoder, [document.record for document, _ in wanted])
            for (document, output), (ids, mask) in zip(wanted, encoded, strict=True):
                output.add(document.place, ids, mask, bad_lines=document.bad_lines)
            check_untrained(list(outputs.values()), allowed=config.max_untrained_fraction)
            progress.update(max(0, min(reader.bytes_read, total) - progress.done))
            progress.note(rows=sum(output.rows for output in outputs.values()))
        progress.update(max(0, total - progress.done))
    return reader.bad_lines


def _batches(reader: Documents) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in reader:
        batch.append(document)
        characters += len(document.record.text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
