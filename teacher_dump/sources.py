"""Where `prepare` gets its documents: one small protocol, over text files or over a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from potstill.common.errors import UserError
from potstill.teacher_dump.config import PrepareConfig
from potstill.teacher_dump.documents import Document, DocumentReader, Place
from potstill.teacher_dump.inputs import digest_files, find_files
from potstill.teacher_dump.records.base import RecordKind


class Documents(Protocol):
    """One pass over the documents of a source."""

    @property
    def bad_lines(self) -> int:
        """Broken records so far, those before the start included."""

    @property
    def bytes_read(self) -> int:
        """How far the pass has come, of the source's `num_bytes`."""

    def __iter__(self) -> Iterator[Document]: ...


class Source(Protocol):
    """An input whose documents have places that mean the same in every run, and a digest that pins them."""

    @property
    def num_files(self) -> int:
        """Files (or shards of a data set): `Place.file` is below this."""

    @property
    def num_bytes(self) -> int:
        """Size of the input for the progress, 0 where it is not known."""

    @property
    def digest(self) -> str:
        """Another value for another input; a cursor is used only where it is equal."""

    def info(self) -> Mapping[str, Any]:
        """What run.json keeps beside the digest."""

    def read(self, *, start: Place | None = None, bad_lines: int = 0) -> Documents:
        """The documents from `start` on; `bad_lines` broken records were counted before it."""


class FileSource:
    """Files of records, read as they stand."""

    def __init__(self, config: PrepareConfig, kind: RecordKind) -> None:
        self._config, self._kind = config, kind
        self._files = find_files(config.input)
        self.num_files = len(self._files)
        self.num_bytes = sum(file.num_bytes for file in self._files)
        if self.num_bytes == 0:
            raise UserError(f"input {config.input}: {self.num_files} files, all empty; there is nothing to prepare")
        self.digest = digest_files(self._files)

    def info(self) -> Mapping[str, Any]:
        """Nothing: files may be moved between runs."""
        return {}

    def read(self, *, start: Place | None = None, bad_lines: int = 0) -> DocumentReader:
        """The documents from `start` on."""
        return DocumentReader(
            self._files,
            kind=self._kind,
            max_bad_lines=self._config.max_bad_lines,
            start=start,
            bad_lines_before=bad_lines,
        )


def open_source(config: PrepareConfig, kind: RecordKind) -> Source:
    """The input of this configuration. Raises UserError when it cannot be read."""
    if config.dataset is None:
        return FileSource(config, kind)
    from potstill.teacher_dump.hf_datasets import open_dataset

    return open_dataset(config.dataset, kind=kind, max_bad_lines=config.max_bad_lines)
