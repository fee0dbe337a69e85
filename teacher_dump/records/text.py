"""Plain text: one field, every token of which is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from potstill.teacher_dump.records.base import BadRecord, IdsAndMask, Record, as_text

if TYPE_CHECKING:
    from potstill.teacher_dump.config import PrepareConfig
    from potstill.teacher_dump.tokenizer import TextEncoder


class PlainText:
    """See RecordKind. The split hashes the text."""

    masked = False
    required = True

    def __init__(self, field: str) -> None:
        self._field = field
        self.fields = {"text_field": field}

    def read(self, values: Mapping[str, Any]) -> Record | BadRecord:
        text = as_text(values[self._field], self._field)
        return text if isinstance(text, BadRecord) else Record(text, text)

    def encode(self, encoder: TextEncoder, records: Sequence[Record]) -> list[IdsAndMask]:
        return [(ids, None) for ids in encoder.encode([record.text for record in records])]

    def info(self) -> Mapping[str, Any]:
        return {"text_field": self._field}


def make(config: PrepareConfig) -> PlainText:
    """The kind of this configuration."""
    return PlainText(config.text_field or "text")
