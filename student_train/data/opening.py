"""Open one store that the configuration names, and see that it belongs to the tokens it is used with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from potstill.common.errors import UserError
from potstill.storage import StoreError, StoreReader, UnsealedError, check_alignment, shared_note
from potstill.storage.loading.joining import first_difference

log = logging.getLogger(__name__)

_MAKERS = {"tokens": "prepare", "targets": "dump", "scores": "score"}  # the command that writes each kind


def open_store(path: Path | str, kind: str, key: str, **options: Any) -> StoreReader:
    """Open a sealed store of the given kind with these options of the reader. Raises UserError naming the key."""
    if isinstance(path, Path) and not path.is_dir():
        state = "is a file, not a store" if path.exists() else "does not exist"
        raise UserError(f"{key} = {path} {state}; give the folder of a {kind} store (potstill {_MAKERS[kind]})")
    try:
        reader = StoreReader(path, **options)
    except UnsealedError as error:
        raise UserError(
            f"{key} = {path} is not sealed: units are missing; finish and seal it (potstill status, potstill seal)"
        ) from error
    except StoreError as error:
        raise UserError(f"{key} = {path}: {error}") from error
    if reader.spec.kind != kind:
        raise UserError(f"{key} = {path} is a {reader.spec.kind} store; expected a {kind} store")
    return reader


FIELD_NAMES = {"input_digest": "input_digest (the tokens store it was made from)", "num_rows": "number of rows"}


def check_belongs(reader: StoreReader, tokens: StoreReader, *, key: str, tokens_key: str) -> None:
    """Refuse a store that was not made from these tokens. Raises UserError naming field, found and expected."""
    difference = first_difference(reader, tokens)
    if difference is not None:
        field, found, expected = difference
        raise UserError(
            f"{key} does not belong to {tokens_key}: its {FIELD_NAMES.get(field, field)} is {found}, expected "
            f"{expected}; dump or score the tokens store that you train on, or name the other tokens store"
        )


def check_targets(targets: StoreReader, tokens: StoreReader, *, key: str) -> None:
    """See on some rows that the targets stand at the tokens they are for. Raises UserError; a shift by one trains.

    A wrong store ends here, before there is a model; each row is looked at again when it is read (`check_aligned`).
    Where neither labels nor first choices can tell, that is said in one line.
    """
    # Of stores at a URL one rank of a node looks: each row is a request.
    node = targets.shared_by if "://" in targets.url and "://" in tokens.url else None
    what = {"what": "alignment", "version": 1, "tokens": tokens.digest, "targets": targets.digest}
    try:
        doubt = shared_note(node, what, lambda: {"doubt": _doubt(tokens, targets)})["doubt"]
    except StoreError as error:
        raise UserError(f"{key}: {error}; dump it again from the tokens store that you train on") from error
    if doubt is not None:
        log.warning(
            "%s is taken on trust to stand at its tokens: it holds no labels to compare, and %s, which cannot tell",
            key,
            doubt,
        )


def _doubt(tokens: StoreReader, targets: StoreReader) -> str | None:
    """What was found where it cannot tell, or None. Raises StoreError where the targets stand elsewhere."""
    report = check_alignment(tokens, targets)
    if report.is_certain:
        return None
    assert report.first_choices is not None
    return report.first_choices.text
