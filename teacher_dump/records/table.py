"""The kinds of records. A new one is a module beside this one and an entry here.

The configuration reads the table, so nothing heavy is imported with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RecordEntry:
    """What the configuration needs to know of a kind before its module is imported.

    module:         whole name of the module with `make(config: PrepareConfig) -> RecordKind`
    needs:          keys of the configuration that must be set beside the kind's own
    keys:           further keys that mean something with this kind only
    reads_template: whether the tokenizer's chat template makes its tokens, begin and end included
    """

    module: str
    needs: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    reads_template: bool = False


PLAIN_TEXT = "text_field"
RECORD_KINDS: dict[str, RecordEntry] = {  # by the key of PrepareConfig that asks for it
    PLAIN_TEXT: RecordEntry(module="potstill.teacher_dump.records.text"),
    "prompt_field": RecordEntry(
        module="potstill.teacher_dump.records.prompts",
        needs=("response_field",),
        keys=("response_field", "prompt_format", "response_format"),
    ),
    "messages_field": RecordEntry(module="potstill.teacher_dump.records.chat", keys=("train_on",), reads_template=True),
}


def kind_key(settings: Mapping[str, Any]) -> str:
    """The key that decides the kind, among the keys that are set (to something), key -> value.

    Raises ValueError that names the keys where they do not go together.
    """
    given = [key for key in RECORD_KINDS if settings.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are set; a record is of one kind: leave all but one out")
    chosen = given[0] if given else PLAIN_TEXT
    for key, entry in RECORD_KINDS.items():
        alien = [name for name in entry.keys if settings.get(name) is not None]
        if key != chosen and alien:
            raise ValueError(f"{alien[0]} belongs to {key}, which is not set; set {key}, or leave {alien[0]} out")
    entry = RECORD_KINDS[chosen]
    for name in entry.needs:
        if settings.get(name) is None:
            raise ValueError(f"{chosen} is set and {name} is not; name that field too")
    if entry.reads_template:
        _check_template(chosen, settings)
    return chosen


def _check_template(chosen: str, settings: Mapping[str, Any]) -> None:
    if settings.get("train_tokenizer") is not None:
        raise ValueError(f"{chosen} needs a tokenizer with a chat template, which train_tokenizer does not make")
    for name in ("append_eos", "add_bos"):
        if settings.get(name):
            raise ValueError(
                f"{name} is on, but with {chosen} the chat template begins and ends a document; leave it out"
            )
