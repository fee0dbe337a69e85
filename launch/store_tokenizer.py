"""That a tokenizer is the one of a store: another one would show other text, and nobody could see it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.common.errors import UserError
from potstill.common.token_table import tokenizer_digest, tokenizer_file


def check_tokenizer(place: Path, *, digest: str, store: str) -> None:
    """Refuse a tokenizer folder or tokenizer.json that is not the one of a store (`digest`). Raises UserError."""
    from tokenizers import Tokenizer

    file = tokenizer_file(place)
    try:
        found = tokenizer_digest(_Backed(Tokenizer.from_file(str(file))))
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"{file} is not a tokenizer.json that can be read ({type(error).__name__}: {error}); name the tokenizer "
            "that the store was made with"
        ) from error
    if found != digest and place.is_dir():
        # Some classes of transformers change parts of the file while they load it, as prepare did then.
        from transformers import AutoTokenizer

        try:
            found = tokenizer_digest(
                AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"tokenizer {place} cannot be loaded: {error}") from error
    if found != digest:
        raise UserError(
            f"tokenizer {place} has the digest {found[:16]}, but the rows of {store} were made with {digest[:16]}: it "
            "would show other text; name the tokenizer that prepare used (it keeps a copy beside the stores)"
        )


@dataclass(frozen=True)
class _Backed:
    """A bare tokenizer in the shape that tokenizer_digest takes."""

    backend_tokenizer: Any
