"""Kinds of records: which tokens are trained on, what is a broken record, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from potstill.common.errors import UserError
from potstill.teacher_dump import PrepareConfig
from potstill.teacher_dump.records.base import BadRecord, Record, RecordKind, record_kind
from potstill.teacher_dump.records.chat import Chat
from potstill.teacher_dump.records.prompts import Prompts
from potstill.teacher_dump.records.table import RECORD_KINDS, RecordEntry
from potstill.teacher_dump.tokenizer import TextEncoder, load_tokenizer, text_encoder
from tests.teacher_dump.tiny import CHAT_TEMPLATE, chat_tokenizer

TALK = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "what runs slow?"},
    {"role": "assistant", "content": "the still"},
    {"role": "user", "content": "and clear?"},
    {"role": "assistant", "content": "the pot, through the worm"},
]
ANSWERS = ["the still<|im_end|>\n", "the pot, through the worm<|im_end|>\n"]
# Marks the text of an answer and the token that ends it, but not the line break after that.
MARKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)
# Leaves thoughts out of every answer but the last, as the templates of reasoning models do.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn, please') }}{% endif %}" + CHAT_TEMPLATE
)
JOINING = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }} {% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)


@pytest.fixture(scope="module")
def encoder(tokenizer_folder: Path) -> TextEncoder:
    return text_encoder(str(tokenizer_folder), append_eos=True, add_bos=True)


def read(kind: RecordKind, values: Mapping[str, Any]) -> Record:
    found = kind.read(values)
    assert isinstance(found, Record), found
    return found


def spans(mask: np.ndarray) -> list[slice]:
    """The runs of a mask that are on."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    return [slice(start, stop) for start, stop in edges.reshape(-1, 2)]


def test_the_response_is_trained_on_with_the_end(encoder: TextEncoder) -> None:
    kind = Prompts(prompt_field="q", response_field="a", prompt_format="Q: {prompt}\nA:", response_format=" {response}")
    pairs = [("the pot", "runs {prompt}"), ("slow and {response}", "é 酒")]
    records = [read(kind, {"q": q, "a": a, "other": 1}) for q, a in pairs]
    assert [record.key for record in records] == [q for q, _ in pairs]  # whatever is answered
    for (q, a), record, (ids, mask) in zip(pairs, records, kind.encode(encoder, records), strict=True):
        assert ids.dtype == np.int32 and mask is not None and mask.dtype == np.bool_ and len(ids) == len(mask)
        (span,) = spans(mask)
        assert span.stop == len(ids) and ids[-1] == 0 and ids[0] == 0 and not mask[0]
        decode = encoder.tokenizer.decode
        assert (decode(ids[1 : span.start]), decode(ids[span.start : -1])) == (f"Q: {q}\nA:", f" {a}")
        assert record.text == f"Q: {q}\nA: {a}"
        # The boundary is one between tokens: the prompt has the ids that it has by itself.
        assert ids[1 : span.start].tolist() == encoder.plain_ids([f"Q: {q}\nA:"])[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"q": "x", "a": None}, "field 'a' is NoneType, expected a text"),
        ({"q": 3, "a": "x"}, "field 'q' is int"),
        ({"q": "x", "a": " \n"}, "field 'a' is empty"),
        ({"q": "", "a": "x"}, "field 'q' is empty"),
        ({"q": "x", "a": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_a_prompt_or_response_that_cannot_be_used(values: dict[str, Any], message: str) -> None:
    found = Prompts(prompt_field="q", response_field="a").read(values)
    assert isinstance(found, BadRecord) and message in str(found)


def chat(folder: Path, template: str | None = CHAT_TEMPLATE, train_on: str = "responses") -> Chat:
    return Chat(source=str(chat_tokenizer(folder, template)), field="talk", train_on=train_on)


@pytest.mark.parametrize(
    ("template", "train_on", "expected"),
    [
        (CHAT_TEMPLATE, "responses", ANSWERS),
        (MARKING, "marked", [answer.strip("\n") for answer in ANSWERS]),
    ],
    ids=["responses", "marked"],
)
def test_answers_of_a_conversation(template: str, train_on: str, expected: list[str], tmp_path: Path) -> None:
    kind = chat(tmp_path / "t", template, train_on)
    record = read(kind, {"talk": TALK})
    ((ids, mask),) = kind.encode(None, [record])  # type: ignore[arg-type]  # tokens were made while reading
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    assert ids.tolist() == tokenizer.apply_chat_template(TALK, return_dict=False)
    assert mask is not None
    assert [tokenizer.decode(ids[span]) for span in spans(mask)] == expected
    # All answers to one beginning fall on one side of the split.
    other = read(kind, {"talk": [*TALK[:2], {"role": "assistant", "content": "the mash"}]})
    assert other.key == record.key != read(kind, {"talk": TALK[1:]}).key


def test_what_stands_before_an_answer_is_what_a_model_is_asked_with(tmp_path: Path) -> None:
    kind = chat(tmp_path / "t")
    ids, mask = read(kind, {"talk": TALK}).content
    asked = load_tokenizer(str(tmp_path / "t")).apply_chat_template(
        TALK[:4], add_generation_prompt=True, return_dict=False
    )
    assert ids[: spans(mask)[1].start].tolist() == asked


@pytest.mark.parametrize(
    ("template", "talk", "message"),
    [
        (CHAT_TEMPLATE, "hello", "is str, expected a list of messages"),
        (CHAT_TEMPLATE, [], "is an empty list"),
        (CHAT_TEMPLATE, [{"content": "x"}], "message 1 of field 'talk' is no object with a role"),
        (CHAT_TEMPLATE, [*TALK, {"role": "user", "content": None}], "content of message 6 of talk' is NoneType"),
        (CHAT_TEMPLATE, TALK[:2], "no message of role 'assistant'"),
        (CHAT_TEMPLATE, TALK[2:], "begins with an answer"),
        (
            CHAT_TEMPLATE,
            [TALK[1], {"role": "assistant", "content": ""}],
            "message 2 of field 'talk', an answer, is empt",
        ),
        (CHAT_TEMPLATE, [{"role": "user", "content": "a<|im_end|>b"}, TALK[2]], "the special token '<|im_end|>' as te"),
        (STRICT, TALK, "refuses field 'talk': no system turn, please"),
        (FORGETFUL, TALK, "message 3 of field 'talk': the chat template writes the beginning .* train_on=marked"),
        (JOINING, TALK, "message 3 of field 'talk': no token begins where the answer does.*train_on=marked"),
    ],
    ids=[f"talk{number}" for number in range(11)],
)
def test_a_conversation_that_cannot_be_used(template: str, talk: Any, message: str, tmp_path: Path) -> None:
    found = chat(tmp_path / "t", template).read({"talk": talk})
    assert isinstance(found, BadRecord)
    with pytest.raises(BadRecord, match=message):
        raise found


@pytest.mark.parametrize(
    ("template", "train_on", "message"),
    [
        (None, "responses", "has no chat template.*use prompt_field and response_field"),
        (CHAT_TEMPLATE, "marked", "does not mark what is generated.*train_on=responses"),
    ],
    ids=["none", "unmarked"],
)
def test_a_template_that_cannot_serve_is_refused(
    template: str | None, train_on: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        chat(tmp_path / "t", template, train_on).read({"talk": TALK})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"text_field": "text", "prompt_field": "q"}, "text_field and prompt_field are set; a record is of one kind"),
        (
            {"prompt_field": "q", "messages_field": "m", "response_field": "a"},
            "prompt_field and messages_field are set",
        ),
        ({"prompt_field": "q"}, "prompt_field is set and response_field is not"),
        ({"response_field": "a"}, "response_field belongs to prompt_field, which is not set"),
        ({"train_on": "marked"}, "train_on belongs to messages_field, which is not set"),
        ({"messages_field": "m", "append_eos": True}, "append_eos is on, but with messages_field the chat template"),
        (
            {"messages_field": "m", "tokenizer": None, "train_tokenizer": {"vocab_size": 300}},
            "needs a tokenizer with a",
        ),
        (
            {"prompt_field": "q", "response_field": "a", "prompt_format": "Q"},
            "expected a text with {prompt} in it, once",
        ),
        ({"too_long": "drop"}, "too_long is of packing=whole"),
        ({"packing": "tight"}, "Input should be 'cut', 'whole' or 'rows'"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PrepareConfig(**({"input": ["x"], "output": "out", "tokenizer": "t"} | keys))


class Backwards:
    """A kind that reads a field from its end."""

    fields: Mapping[str, str] = {"text_field": "back"}
    masked = False
    required = False

    def read(self, values: Mapping[str, Any]) -> Record | BadRecord:
        return Record(values["back"], values["back"])

    def encode(self, encoder: TextEncoder, records: Any) -> Any:
        return [(ids, None) for ids in encoder.encode([record.text[::-1] for record in records])]

    def info(self) -> Mapping[str, Any]:
        return {"record": {"kind": "backwards"}}


def make(config: PrepareConfig) -> Backwards:
    return Backwards()


def test_a_new_kind_is_a_module_and_an_entry(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill.storage import StoreReader
    from potstill.teacher_dump import prepare

    monkeypatch.setitem(RECORD_KINDS, "text_field", RecordEntry(module=__name__))
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"back": "top"}) + "\n")
    config = PrepareConfig(input=[path], output=tmp_path / "out", tokenizer=tokenizer_folder, row_length=8)
    assert isinstance(record_kind(config), Backwards)
    prepare(config)
    reader = StoreReader(tmp_path / "out" / "train")
    assert load_tokenizer(str(tokenizer_folder)).decode(reader.row(0).tokens).startswith("pot")  # type: ignore[union-attr]
    assert reader.spec.info["record"] == {"kind": "backwards"}
    shutil.rmtree(tmp_path / "out")
