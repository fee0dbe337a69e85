"""train_on marked: every token of what a template marks is trained on, and no other, whatever the tokenizer does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from potstill.common.errors import UserError
from potstill.teacher_dump.records.base import BadRecord, Record
from potstill.teacher_dump.records.chat import Chat
from potstill.teacher_dump.tokenizer import load_tokenizer
from tests.teacher_dump.tiny import chat_tokenizer

# Only the text of an answer is marked; the marks stand on lines of their own and eat the white space round them.
SPARE = """{%- for m in messages %}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}
    {%- generation -%}
    {{ m.content }}
    {%- endgeneration -%}
{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}"""
OPEN = (
    "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}{% generation %}{{ m.content }} "
    "{% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
)


def talk(*answers: str) -> list[dict[str, str]]:
    turns = [[{"role": "user", "content": "mash"}, {"role": "assistant", "content": answer}] for answer in answers]
    return [message for turn in turns for message in turn]


def trained(folder: Path, messages: list[dict[str, str]]) -> list[str]:
    """The texts of the spans that are trained on."""
    record = Chat(source=str(folder), field="talk", train_on="marked").read({"talk": messages})
    assert isinstance(record, Record), record
    ids, mask = record.content
    tokenizer = load_tokenizer(str(folder))
    found: list[list[int]] = []
    assert ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
    for number, (one, on) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
        if on and (number == 0 or not mask[number - 1]):
            found.append([])
        if on:
            found[-1].append(one)
    return [tokenizer.decode(span) for span in found]


@pytest.fixture(scope="module")
def spare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_tokenizer(tmp_path_factory.mktemp("spare") / "t", SPARE)


def test_an_answer_is_trained_on_to_the_last_byte_of_its_last_character(spare: Path) -> None:
    answers = ["the still 🙂", "酒", "the pot"]
    assert trained(spare, talk(*answers)) == answers


def test_marks_are_read_as_transformers_reads_them(spare: Path) -> None:
    messages = talk("the still", "the pot, and the mash")
    record = Chat(source=str(spare), field="talk", train_on="marked").read({"talk": messages})
    assert isinstance(record, Record)
    theirs: Any = load_tokenizer(str(spare)).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert record.content[1].astype(int).tolist() == theirs["assistant_masks"] and sum(theirs["assistant_masks"])


def test_where_a_tokenizer_drops_the_end_of_an_answer_no_prompt_is_trained_on(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["?", "user", "assistant", "mash", "still", "pot"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    made.chat_template = OPEN
    made.save_pretrained(tmp_path / "t")
    assert trained(tmp_path / "t", talk("still", "pot")) == ["still", "pot"]


def test_places_that_cannot_be_told_are_a_broken_record(spare: Path, tmp_path: Path) -> None:
    kind = Chat(source=str(spare), field="talk", train_on="marked")
    found = kind.read({"talk": talk("the \ue000 still")})
    assert isinstance(found, BadRecord) and "U+E000" in str(found)
    with pytest.raises(UserError, match="does not mark what is generated"):
        Chat(source=str(chat_tokenizer(tmp_path / "t")), field="talk", train_on="marked").read({"talk": talk("pot")})
