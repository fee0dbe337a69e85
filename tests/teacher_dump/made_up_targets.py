"""A format that only a test knows: `.npz` files with tokens [R, n], ids and logprobs [R, n, k]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.importing.foreign_records import Entries, ForeignRecord, FoundRecord, SourceFacts
from potstill.teacher_dump.importing.targets_config import ImportTargetsConfig


class NpzTargets:
    """See TargetsSource."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with np.load(path) as arrays:
            self._arrays = dict(arrays)
        rows, _, k = self._arrays["ids"].shape
        self.facts = SourceFacts(
            format="npz",
            num_files=1,
            num_bytes=path.stat().st_size,
            digest="made up",
            values="logprobs",
            selection={"mode": "top_k", "k": k},
            num_records=rows,
            has_tokens=True,
        )

    def read(self, start: Place, *, entries: bool) -> Iterator[FoundRecord]:
        for row in range(start.record, len(self._arrays["tokens"])):
            found = Entries.of_table(self._arrays["ids"][row], self._arrays["logprobs"][row]) if entries else None
            record = ForeignRecord(self._arrays["tokens"][row].astype(np.int64), None, found)
            yield FoundRecord(Place(0, row), Place(0, row + 1), f"{self._path}, row {row}", record)


def recognises(inputs: Sequence[str]) -> bool:
    return inputs[0].endswith(".npz")


def open_source(config: ImportTargetsConfig) -> NpzTargets:
    return NpzTargets(Path(config.input[0]))
