"""A prompt and its response in two fields: the response is trained on, with the end of the document.

Both are tokenized apart, so that the boundary between them is one between tokens, as it is where a model answers a
prompt that was tokenized by itself. They are joined as they stand; what goes between them stands in a format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill.teacher_dump.records.base import BadRecord, IdsAndMask, Record, as_text

if TYPE_CHECKING:
    from potstill.teacher_dump.config import PrepareConfig
    from potstill.teacher_dump.tokenizer import TextEncoder

PROMPT, RESPONSE = "{prompt}", "{response}"


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """See RecordKind. The split hashes the prompt: all answers to one prompt fall on one side."""

    prompt_field: str
    response_field: str
    prompt_format: str = PROMPT
    response_format: str = RESPONSE
    masked = True
    required = False

    @property
    def fields(self) -> Mapping[str, str]:
        return {"prompt_field": self.prompt_field, "response_field": self.response_field}

    def read(self, values: Mapping[str, Any]) -> Record | BadRecord:
        found = []
        for name in (self.prompt_field, self.response_field):
            text = as_text(values[name], name)
            if isinstance(text, BadRecord):
                return text
            if not text.strip():
                return BadRecord(f"field {name!r} is empty, expected a text")
            found.append(text)
        prompt = self.prompt_format.replace(PROMPT, found[0])
        response = self.response_format.replace(RESPONSE, found[1])
        return Record(prompt + response, found[0], (prompt, response))

    def encode(self, encoder: TextEncoder, records: Sequence[Record]) -> list[IdsAndMask]:
        ids = encoder.plain_ids([text for record in records for text in record.content])
        return [self._joined(encoder, *pair) for pair in zip(ids[::2], ids[1::2], strict=True)]

    def info(self) -> Mapping[str, Any]:
        names = ("prompt_field", "response_field", "prompt_format", "response_format")
        return {"record": {"kind": "prompts", **{name: getattr(self, name) for name in names}}}

    @staticmethod
    def _joined(encoder: TextEncoder, prompt: list[int], response: list[int]) -> IdsAndMask:
        before, after = [*encoder.prefix, *prompt], [*response, *encoder.suffix]
        mask = np.zeros(len(before) + len(after), np.bool_)
        mask[len(before) :] = True
        return np.array([*before, *after], np.int32), mask


def make(config: PrepareConfig) -> Prompts:
    """The kind of this configuration."""
    assert config.prompt_field is not None and config.response_field is not None
    return Prompts(
        prompt_field=config.prompt_field,
        response_field=config.response_field,
        prompt_format=config.prompt_format or PROMPT,
        response_format=config.response_format or RESPONSE,
    )
