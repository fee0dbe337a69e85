"""prepare: text files or a data set -> tokens stores of packed rows, `train/` and `heldout/`.

One pass in the order of the input; memory holds a few documents and one unit of rows per store. Each commit record
carries the cursor at its end, so that a run that was killed goes on there and its stores are equal to the bit.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from potstill.common.config import inside
from potstill.common.errors import UserError
from potstill.common.progress import Progress, format_seconds
from potstill.storage import RunSpec, StoreWriter, TokensRow, seal_store
from potstill.teacher_dump.config import PrepareConfig
from potstill.teacher_dump.documents import Document, Place
from potstill.teacher_dump.packing import Cursor, PackedRow, Packer
from potstill.teacher_dump.sources import Documents, Source, open_source
from potstill.teacher_dump.split import Split
from potstill.teacher_dump.tokenizer import TextEncoder, keep_tokenizer, text_encoder, train_bpe

log = logging.getLogger(__name__)

TRAIN, HELDOUT = "train", "heldout"
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 256, 1 << 20


@dataclass(frozen=True)
class StoreSummary:
    """What one store holds."""

    path: Path | str
    documents: int
    rows: int
    tokens: int


@dataclass(frozen=True)
class PrepareSummary:
    """What `prepare` has made; `resumed_rows` were there from an earlier run."""

    stores: tuple[StoreSummary, ...]
    tokenizer: str
    tokenizer_digest: str
    vocab_size: int
    row_length: int
    num_files: int
    input_bytes: int
    bad_lines: int
    resumed_rows: int
    seconds: float

    def format(self) -> str:
        """A few lines for a person."""
        lines = [
            f"{_last_part(store.path)}: {store.documents} documents, {store.tokens} tokens in {store.rows} rows of "
            f"{self.row_length} -> {store.path}"
            for store in self.stores
        ]
        lines.append(f"tokenizer: {self.tokenizer} ({self.vocab_size} entries, digest {self.tokenizer_digest[:12]})")
        lines.append(
            f"read {self.num_files} files, {self.input_bytes / 1e6:.1f} MB in {format_seconds(self.seconds)}; "
            f"{self.bad_lines} broken records skipped; {self.resumed_rows} rows were there from an earlier run"
        )
        return "\n".join(lines)


class _Output:
    """One tokens store being written: packs documents, commits whole units, goes on where an earlier run ended."""

    def __init__(self, path: Path | str, spec: RunSpec, *, force: bool) -> None:
        self.path = path
        self._writer = StoreWriter.create(path, spec, force=force)
        records = self._writer.committed()
        self._unit = next(unit for unit in itertools.count() if unit not in records)
        self.complete = False
        self.start: Cursor | None = None
        self.bad_lines: int | None = None
        first_row = 0
        if self._unit:
            extra = records[self._unit - 1].extra
            self.start = Cursor.from_json(extra["cursor"])
            self.complete = bool(extra["end"])
            self.bad_lines = extra["bad_lines"]
            first_row = int(extra["rows"])
        self.resumed_rows = first_row
        self.rows = first_row
        self._pending: list[PackedRow] = []
        self._packer = Packer(row_length=spec.row_length, first_row=first_row, start=self.start)

    def wants(self, place: Place) -> bool:
        return not self.complete and self._packer.wants(place)

    def add(self, document: Document, ids: np.ndarray) -> None:
        for packed in self._packer.add(document, ids):
            self._append(packed)

    def finish(self, end: Place, *, bad_lines: int) -> StoreSummary:
        """Commit what is left; the store must not be empty."""
        if not self.complete:
            for packed in self._packer.finish(end, bad_lines=bad_lines):
                self._append(packed)
            if self._pending:
                self._commit(bad_lines=bad_lines)
        return StoreSummary(self.path, self._packer.documents, self.rows, self._packer.tokens)

    def _append(self, packed: PackedRow) -> None:
        # A unit is committed only when a next row shows that it was not the last one, which is marked in its record.
        if len(self._pending) == self._writer.spec.rows_per_unit:
            self._commit()
        self._pending.append(packed)

    def _commit(self, *, bad_lines: int | None = None) -> None:
        """Commit the pending rows; `bad_lines` of the whole input is given with the last unit only."""
        rows: list[TokensRow] = [packed.row for packed in self._pending]
        self.rows += len(rows)
        cursor = self._pending[-1].cursor
        extra = {"cursor": cursor.to_json(), "rows": self.rows, "end": bad_lines is not None, "bad_lines": bad_lines}
        self._writer.commit_unit(self._unit, rows, extra=extra)
        self._unit += 1
        self._pending = []


def prepare(config: PrepareConfig) -> PrepareSummary:
    """Tokenize and pack `config.input` into sealed tokens stores under `config.output`.

    Run again after a kill, it goes on; run again after the end, it does nothing. Raises UserError for bad input and
    StoreError for trouble with the stores.
    """
    started = time.monotonic()
    source = open_source(config)
    if isinstance(config.output, Path):
        config.output.mkdir(parents=True, exist_ok=True)
    split = _make_split(config, source)
    tokenizer = _tokenizer_place(config, source, split)
    encoder = text_encoder(tokenizer, append_eos=config.append_eos, add_bos=config.add_bos)
    if config.train_tokenizer is None and isinstance(config.output, Path):
        _keep_tokenizer(config, encoder)
    spec = _run_spec(config, source, encoder, split)
    outputs = {
        name: _Output(inside(config.output, name), spec(name), force=config.force)
        for name in ((TRAIN, HELDOUT) if split.threshold else (TRAIN,))
    }
    bad_lines = _fill(source, split, encoder, outputs)
    end = Place(source.num_files, 0)
    stores = [output.finish(end, bad_lines=bad_lines) for output in outputs.values()]
    for store in stores:
        if store.rows == 0:
            raise UserError(_nothing_in(store.path, bad_lines))
    for store in stores:
        seal_store(store.path)
    return PrepareSummary(
        stores=tuple(stores),
        tokenizer=tokenizer,
        tokenizer_digest=encoder.digest,
        vocab_size=encoder.vocab_size,
        row_length=config.row_length,
        num_files=source.num_files,
        input_bytes=source.num_bytes,
        bad_lines=bad_lines,
        resumed_rows=sum(output.resumed_rows for output in outputs.values()),
        seconds=time.monotonic() - started,
    )


def _make_split(config: PrepareConfig, source: Source) -> Split:
    if config.heldout_documents:
        texts = (document.text for document in source.read() if document.text)
        return Split.by_count(texts, count=config.heldout_documents, salt=config.split_salt)
    return Split.by_fraction(config.heldout_fraction, salt=config.split_salt)


def _keep_tokenizer(config: PrepareConfig, encoder: TextEncoder) -> None:
    """A copy beside the stores, so that they can be used where the model's folder is not."""
    folder = Path(config.output) / "tokenizer"
    if folder.is_dir() and Path(str(config.tokenizer)).is_dir() and folder.samefile(str(config.tokenizer)):
        return
    keep_tokenizer(encoder, folder, force=config.force)


def _tokenizer_place(config: PrepareConfig, source: Source, split: Split) -> str:
    if config.train_tokenizer is None:
        assert config.tokenizer is not None
        return config.tokenizer
    folder = Path(config.output) / "tokenizer"  # a place of its own kind is refused by the configuration
    reader = source.read()
    with Progress(source.num_bytes or None, unit="bytes", description="train tokenizer") as progress:

        def texts() -> Iterator[str]:
            for document in reader:
                progress.update(max(0, reader.bytes_read - progress.done))
                if not split.held_out(document.text):
                    yield document.text

        settings = config.train_tokenizer
        train_bpe(folder, texts(), settings=settings, input_digest=source.digest, force=config.force)
    return str(folder)


def _run_spec(config: PrepareConfig, source: Source, encoder: TextEncoder, split: Split) -> Callable[[str], RunSpec]:
    def spec(part: str) -> RunSpec:
        return RunSpec(
            kind="tokens",
            row_length=config.row_length,
            rows_per_unit=config.rows_per_unit,
            num_rows=None,
            vocab_size=encoder.vocab_size,
            tokenizer_digest=encoder.digest,
            info={
                "part": part,
                "input": {
                    "digest": source.digest,
                    "files": source.num_files,
                    "bytes": source.num_bytes,
                    **source.info(),
                },
                "text_field": config.text_field,
                "prefix": list(encoder.prefix),
                "suffix": list(encoder.suffix),
                "split": {"threshold": str(split.threshold), "salt": split.salt},
            },
        )

    return spec


def _fill(
    source: Source,
    split: Split,
    encoder: TextEncoder,
    outputs: dict[str, _Output],
) -> int:
    """Read from the earliest cursor to the end; returns the number of broken records over the whole input."""
    open_outputs = [output for output in outputs.values() if not output.complete]
    if not open_outputs:
        return max(int(output.bad_lines or 0) for output in outputs.values())
    behind = min(open_outputs, key=lambda output: output.start.place if output.start else Place(0, 0))
    start = behind.start.place if behind.start else Place(0, 0)
    if behind.start:
        log.info("prepare goes on at file %d of %d, record %d", start.file + 1, source.num_files, start.record + 1)
    reader = source.read(start=start, bad_lines=behind.start.bad_lines if behind.start else 0)
    total = source.num_bytes
    with Progress(total or None, unit="bytes", description="prepare") as progress:
        for batch in _batches(reader):
            wanted = []
            for document in batch:
                output = outputs[HELDOUT if split.held_out(document.text) else TRAIN]
                if output.wants(document.place):
                    wanted.append((document, output))
            ids_of = encoder.encode([document.text for document, _ in wanted])
            for (document, output), ids in zip(wanted, ids_of, strict=True):
                output.add(document, ids)
            progress.update(max(0, min(reader.bytes_read, total) - progress.done))
            progress.note(rows=sum(output.rows for output in outputs.values()))
        progress.update(max(0, total - progress.done))
    return reader.bad_lines


def _batches(reader: Documents) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in reader:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _last_part(path: Path | str) -> str:
    return str(path).rsplit("/", 1)[-1]


def _nothing_in(path: Path | str, bad_lines: int) -> str:
    if _last_part(path) == HELDOUT:
        return (
            f"{path}: no document fell into the held-out part; the input is too small for this heldout_fraction, "
            "raise it or set heldout_documents"
        )
    return f"{path}: the input holds no text to train on ({bad_lines} broken records skipped)"
