"""What stands at an output and what a command wants there, key by key, in the words of its options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from potstill.storage import RunSpec
from potstill.teacher_dump.split import share_of

# The options that a field of run.json comes from, where its own name is another.
_OPTIONS = {
    "tokenizer_digest": "tokenizer",
    "vocab_size": "vocabulary of the tokenizer",
    "columns": "masks (record, mask_column)",
    "info.input.digest": "content of the input",
    "info.input.files": "files of the input",
    "info.input.bytes": "bytes of the input",
    "info.prefix": "add_bos",
    "info.suffix": "append_eos",
    "info.split.threshold": "held-out share (heldout_fraction, heldout_documents)",
    "info.split.salt": "split_salt",
    "info.packing.rule": "packing",
    "info.packing.window": "packing_window",
    "info.packing.too_long": "too_long",
}
_SHOWN = 60  # characters of a value
_NO_PACKING = {"info.packing.rule": "cut"}  # the rule of a store that names none, which has neither of these
_OF_A_RULE = ("info.packing.window", "info.packing.too_long")


def conflict_text(where: str, found: RunSpec, wanted: RunSpec) -> str:
    """One line for each key whose values differ. where: the run.json of `found`."""
    has, wants = (_NO_PACKING | _flat(spec.to_json()) for spec in (found, wanted))
    lines = [
        f"  {_OPTIONS.get(key, key.removeprefix('info.'))}: the store has {_short(key, has)}, this command wants "
        f"{_short(key, wants)}"
        for key in sorted(has.keys() | wants.keys())
        if has.get(key) != wants.get(key) and (key not in _OF_A_RULE or (key in has and key in wants))
    ]
    return "\n".join(
        [
            f"{where}: rows of another configuration stand here:",
            *lines,
            "use the options of that run to continue it, another output, or --force, which deletes the store and "
            "begins again",
        ]
    )


def _flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return found


def _short(key: str, values: Mapping[str, Any]) -> str:
    value = values.get(key)
    if value is None:
        return "none"
    if key == "info.split.threshold":
        return f"{share_of(int(value)):.6g}"
    text = json.dumps(value)
    if key.endswith("digest"):
        return text[:13].strip('"')
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
