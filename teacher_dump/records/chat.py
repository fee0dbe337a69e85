"""Chat messages through the tokenizer's own template; the assistant's turns are trained on.

Which tokens those are: `train_on: marked` asks the template, which must mark what is generated
(`{% generation %} ... {% endgeneration %}`). `train_on: responses` needs no marks: the text of the template up to each
assistant turn, with the generation prompt, and up to its end must be prefixes of the whole, and so must their tokens.
So the mask is exact, and what stands before an answer is what a model is shown when it is asked for one. A turn's span
has all that the template writes after that: the answer, the token that ends a turn, and what follows it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill.common.errors import UserError
from potstill.common.model_place import one_line
from potstill.teacher_dump.records.base import BadRecord, IdsAndMask, Record, as_text

if TYPE_CHECKING:
    from potstill.teacher_dump.config import PrepareConfig
    from potstill.teacher_dump.tokenizer import TextEncoder

ASSISTANT = "assistant"
RESPONSES, MARKED = "responses", "marked"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_USE_MARKS = (
    f"use train_on={MARKED} with a template that marks what is generated ({{% generation %}} ... "
    "{% endgeneration %}), or a template that writes each turn the same, whatever follows it"
)


class Chat:
    """See RecordKind. The split hashes what comes before the first answer, so all answers to it fall on one side.

    Tokens are made while a record is read: a conversation that the template refuses is a broken record.
    """

    masked = True
    required = False

    def __init__(self, *, source: str, field: str, train_on: str) -> None:
        self._source, self._field, self._train_on = source, field, train_on
        self.fields = {"messages_field": field}

    @cached_property
    def _tokenizer(self) -> Any:
        from potstill.teacher_dump.tokenizer import load_tokenizer

        return load_tokenizer(self._source)

    @cached_property
    def template(self) -> str:
        """The text of the template. Raises UserError where there is none, or it marks nothing and has to."""
        try:
            template: str = self._tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(
                f"tokenizer {self._source!r} has no chat template, and messages_field is set ({one_line(error)}); name "
                "a tokenizer that has one, put a chat_template.jinja beside it, or use prompt_field and response_field"
            ) from error
        if self._train_on == MARKED and not _GENERATION.search(template):
            raise UserError(
                f"the chat template of tokenizer {self._source!r} does not mark what is generated, and train_on is "
                f"{MARKED}; put {{% generation %}} ... {{% endgeneration %}} round the assistant's text in it, or set "
                f"train_on={RESPONSES}"
            )
        return template

    @cached_property
    def _special(self) -> re.Pattern[str]:
        words = sorted(filter(None, self._tokenizer.all_special_tokens), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, words)) if words else r"(?!)")

    def read(self, values: Mapping[str, Any]) -> Record | BadRecord:
        assert self.template
        messages = self._messages(values[self._field])
        if isinstance(messages, BadRecord):
            return messages
        try:
            found = self._marked(messages) if self._train_on == MARKED else self._responses(messages)
        except BadRecord as error:
            return error
        before = messages[: next(turn for turn, message in enumerate(messages) if message["role"] == ASSISTANT)]
        text = "\n".join(message["content"] for message in messages)
        return Record(text, json.dumps(before, sort_keys=True, ensure_ascii=False), found)

    def encode(self, encoder: TextEncoder, records: Sequence[Record]) -> list[IdsAndMask]:
        return [record.content for record in records]

    def info(self) -> Mapping[str, Any]:
        digest = hashlib.sha256(self.template.encode()).hexdigest()
        record = {"kind": "chat", "messages_field": self._field, "train_on": self._train_on, "template_sha256": digest}
        return {"record": record}

    def _messages(self, value: Any) -> list[dict[str, Any]] | BadRecord:
        """The messages, checked: texts with a role, one of them an answer, none with a special token inside."""
        field = self._field
        if not isinstance(value, list) or not value:
            return BadRecord(f"field {field!r} is {_shape(value)}, expected a list of messages (role, content)")
        for number, message in enumerate(value, 1):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                return BadRecord(f"message {number} of field {field!r} is no object with a role and a content")
            text = as_text(message.get("content"), f"content of message {number} of {field}")
            if isinstance(text, BadRecord):
                return text
            if message["role"] == ASSISTANT and not text.strip():
                return BadRecord(f"message {number} of field {field!r}, an answer, is empty")
            if special := self._special.search(text):
                # It would be read as the token itself: a text must not be able to end a turn from inside.
                return BadRecord(f"message {number} of field {field!r} holds the special token {special[0]!r} as text")
        if all(message["role"] != ASSISTANT for message in value):
            return BadRecord(f"field {field!r} has no message of role {ASSISTANT!r}: there is nothing to train on")
        return [{name: part for name, part in message.items() if part is not None} for message in value]

    def _apply(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # a template may raise what it likes
            raise BadRecord(f"the chat template refuses field {self._field!r}: {one_line(error)}") from error

    def _marked(self, messages: list[dict[str, Any]]) -> IdsAndMask:
        found = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return np.array(found["input_ids"], np.int32), np.array(found["assistant_masks"], np.bool_)

    def _responses(self, messages: list[dict[str, Any]]) -> IdsAndMask:
        whole = self._apply(messages, tokenize=False)
        ids = self._ids(whole)
        mask = np.zeros(len(ids), np.bool_)
        for turn, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            if turn == 0:
                raise BadRecord(f"field {self._field!r} begins with an answer: no prompt stands before it")
            before = self._apply(messages[:turn], tokenize=False, add_generation_prompt=True)
            after = whole if turn + 1 == len(messages) else self._apply(messages[: turn + 1], tokenize=False)
            if not (whole.startswith(after) and after.startswith(before)):
                raise BadRecord(
                    f"message {turn + 1} of field {self._field!r}: the chat template writes the beginning of the "
                    f"conversation in another way when more of it follows, so the answer's place is not known; "
                    f"{_USE_MARKS}"
                )
            start, stop = (self._num_tokens(text, ids, turn) for text in (before, after))
            mask[start:stop] = True
        return np.array(ids, np.int32), mask

    def _num_tokens(self, prefix: str, ids: list[int], turn: int) -> int:
        found = self._ids(prefix)
        if ids[: len(found)] != found:
            raise BadRecord(
                f"message {turn + 1} of field {self._field!r}: no token begins where the answer does, or ends where it "
                f"ends: the tokenizer joins its text with what stands beside it; {_USE_MARKS}"
            )
        return len(found)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        return ids


def _shape(value: Any) -> str:
    return "an empty list" if isinstance(value, list) else type(value).__name__


def make(config: PrepareConfig) -> Chat:
    """The kind of this configuration."""
    assert config.messages_field is not None and config.tokenizer is not None
    return Chat(source=config.tokenizer, field=config.messages_field, train_on=config.train_on or RESPONSES)
