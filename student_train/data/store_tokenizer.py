"""The tokenizer of a store: where it lies, and that it is the one. Another would show other text, and nobody see it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from potstill.common.errors import UserError
from potstill.common.token_table import tokenizer_digest


def tokenizers_beside(store: Path | str, info: Mapping[str, Any]) -> list[Path]:
    """Where the tokenizer of a tokens store may lie: where its run.json says, in the store, and beside it."""
    named = info.get("tokenizer")
    found = [Path(named)] if isinstance(named, str) else []
    return found + ([store / "tokenizer", store.parent / "tokenizer"] if isinstance(store, Path) else [])


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of transformers in a folder; nothing is downloaded. Raises UserError."""
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise UserError(f"tokenizer {folder} is no folder; name the folder that holds tokenizer.json")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"tokenizer {folder} cannot be loaded: {error}") from error


def named_tokenizer(folder: Path, *, digest: str, store: str) -> Any:
    """The tokenizer in `folder`, which must be the one of a store (`digest`). Raises UserError."""
    tokenizer = read_tokenizer(folder)
    found = tokenizer_digest(tokenizer)
    if found != digest:
        raise UserError(
            f"tokenizer {folder} has the digest {found[:16]}, but the rows of {store} were made with {digest[:16]}; "
            "name the tokenizer that prepare used (it keeps a copy beside the stores)"
        )
    return tokenizer


def find_tokenizer_of(digest: str, candidates: Iterable[Path | None]) -> tuple[Any | None, list[str]]:
    """The first tokenizer of that digest in the folders `candidates`, or None; and what was found instead of it."""
    others = []
    for folder in dict.fromkeys(candidates):
        if folder is None or not (folder / "tokenizer.json").is_file():
            continue
        try:
            tokenizer = read_tokenizer(folder)
        except UserError as error:
            others.append(str(error))
            continue
        if tokenizer_digest(tokenizer) == digest:
            return tokenizer, others
        others.append(f"{folder} is another one")
    return None, others
