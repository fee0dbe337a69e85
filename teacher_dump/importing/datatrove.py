"""datatrove's `.ds`: ids without a header; beside it `.ds.index`, `.ds.loss` and `.ds.metadata` (DocumentTokenizer).

`.ds.index`: the end of each document in tokens, uint64. `.ds.loss`: a byte for each token, 1 where it is trained on.
`.ds.metadata`: text, line 1 `tokenizer|bytes of an id`, line 2 number of tokens. nanotron reads such folders.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from potstill.common.errors import UserError
from potstill.teacher_dump.importing.arrays import headerless
from potstill.teacher_dump.importing.bounds import INSTEAD, RecordedEnds, choose_bounds
from potstill.teacher_dump.importing.token_file import FlatArray, FlatFile, Reading, TokenFile, file_size

_TYPES = {"2": "uint16", "4": "uint32"}


def open_file(path: Path, reading: Reading) -> TokenFile:
    """Open a `.ds`. Raises UserError where the files beside it do not belong to it."""
    paths = [path]
    dtype, counted = reading.dtype, None
    metadata, index, loss = (path.with_name(f"{path.name}.{end}") for end in ("metadata", "index", "loss"))
    facts: dict[str, str] = {}
    if metadata.is_file():
        paths.append(metadata)
        name, recorded, counted = _metadata(metadata)
        if dtype is not None and dtype != recorded:
            raise UserError(f"{metadata} says that ids are {recorded}, and --dtype is {dtype}; leave it out")
        dtype = recorded
        facts["tokenizer"] = name
    ids = headerless(path, dtype=dtype, vocab_size=reading.vocab_size)
    if counted is not None and counted != ids.count:
        raise UserError(
            f"{metadata} counts {counted} tokens, {path.name} holds {ids.count} of {ids.dtype.name}; a file is cut "
            "off, or they do not belong together: restore them"
        )
    found = None
    if index.is_file() and reading.bounds in ("auto", "recorded"):
        paths.append(index)
        found = _index(index, ids)
    mask = None
    if loss.is_file():
        paths.append(loss)
        if file_size(loss) != ids.count:
            raise UserError(
                f"{loss} has {file_size(loss)} bytes, expected one for each of the {ids.count} tokens of {path.name}; "
                "restore it, or move it away to train on every token"
            )
        mask = FlatArray(loss, np.dtype("u1"), ids.count)
    bounds, kind, hints = choose_bounds(path, found, reading)
    facts |= {"dtype": ids.dtype.name, "bounds": kind}
    return FlatFile(tuple(paths), ids, bounds, facts, mask, hints)


def _index(index: Path, ids: FlatArray) -> RecordedEnds:
    size = file_size(index)
    ends = FlatArray(index, np.dtype("<u8"), size // 8)
    last = int(ends.open()[-1]) if ends.count else 0
    if size % 8 or last != ids.count:
        raise UserError(
            f"{index} has {size} bytes and ends at token {last}, expected 8 bytes for each document and an end at "
            f"{ids.count}; it is cut off, or belongs to other tokens: restore it, {INSTEAD}"
        )
    return RecordedEnds(ends)


def _metadata(path: Path) -> tuple[str, str, int]:
    """(tokenizer, type of the ids, number of tokens) of a metadata file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        name, _, size = lines[0].rpartition("|")
        return name, _TYPES[size], int(lines[1])
    except (UnicodeDecodeError, IndexError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: expected `tokenizer|2` or `tokenizer|4` and the number of tokens on a second line; restore it, "
            "or move it away and name the type (--dtype)"
        ) from error
