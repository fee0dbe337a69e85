"""What each token id stands for, in bytes: also the parts of a character that is cut over several tokens.

Read from the JSON of a Hugging Face tokenizer (tokenizer.json); nothing is imported for it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from potstill.common.errors import UserError

Kind = Literal["byte_level", "sentencepiece", "other"]
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # how sentencepiece writes a space


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 over what decides the ids of a text: normalizer, pre-tokenizer, model and added tokens.

    Truncation, padding, decoder and templates are left out: they do not change how a text is cut.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        whole = json.loads(backend.to_str())
        added = sorted((token["id"], token["content"]) for token in whole.get("added_tokens") or [])
        parts = {key: whole.get(key) for key in ("normalizer", "pre_tokenizer", "model")} | {"added": added}
    else:
        parts = {"class": type(tokenizer).__name__, "vocab": sorted(tokenizer.get_vocab().items())}
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class TokenTable:
    """Bytes of every token id, and which ids are special (they stand for no text).

    `kind`: `byte_level` (GPT-2 and most since: the bytes of a text are exactly those of its tokens),
    `sentencepiece` (exact but for the space that is put before a text), `other` (WordPiece and the like: a piece is
    what it is written as, and how pieces are joined is up to the tokenizer).
    """

    pieces: Mapping[int, bytes]
    special: frozenset[int]
    kind: Kind

    def piece(self, token: int) -> bytes:
        """Bytes of one token; of an id that the tokenizer does not have, its number."""
        found = self.pieces.get(token)
        return f"<{token}>".encode() if found is None else found

    def num_text_bytes(self, tokens: Sequence[int]) -> int:
        """Bytes of text that the tokens stand for; special tokens count 0."""
        return sum(len(self.piece(token)) for token in tokens if token not in self.special)


def tokenizer_file(place: Path) -> Path:
    """The tokenizer.json of a folder, or the file itself. Raises UserError where there is none."""
    file = place / "tokenizer.json" if place.is_dir() else place
    if not file.is_file():
        raise UserError(f"no tokenizer in {place}: expected {file}")
    return file


def read_token_table(place: Path) -> TokenTable:
    """The table of a tokenizer folder or a tokenizer.json. Raises UserError."""
    file = tokenizer_file(place)
    try:
        return token_table(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is not a tokenizer.json that can be read ({type(error).__name__}: {error}); name the tokenizer "
            "that the store was made with"
        ) from error


def token_table(text: str) -> TokenTable:
    """The table of a tokenizer's JSON text. Raises ValueError, KeyError or TypeError on anything else."""
    whole = json.loads(text)
    kind = _kind(whole.get("decoder"))
    vocab = whole["model"]["vocab"]
    items = vocab.items() if isinstance(vocab, dict) else ((entry[0], n) for n, entry in enumerate(vocab))
    pieces = {int(token): _piece_bytes(written, kind) for written, token in items}
    added = whole.get("added_tokens") or []
    pieces |= {int(entry["id"]): str(entry["content"]).encode() for entry in added}
    return TokenTable(pieces, frozenset(int(entry["id"]) for entry in added if entry.get("special")), kind)


def tokenizer_kind(text: str) -> Kind:
    """How a tokenizer of that JSON text writes bytes (see TokenTable). Raises ValueError on anything else."""
    return _kind(json.loads(text).get("decoder"))


def _decoders(decoder: Any) -> Iterator[dict[str, Any]]:
    """A decoder and those that it is made of."""
    if isinstance(decoder, dict):
        yield decoder
        for inner in decoder.get("decoders") or ():
            yield from _decoders(inner)


def _kind(decoder: Any) -> Kind:
    parts = list(_decoders(decoder))
    if any(part.get("type") == "ByteLevel" for part in parts):
        return "byte_level"
    spaces = any((part.get("pattern") or {}).get("String") == _SPACE for part in parts if part.get("type") == "Replace")
    named = any(part.get("type") in ("ByteFallback", "Metaspace") for part in parts)
    return "sentencepiece" if spaces or named else "other"


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level tokenizers write for each byte (the table of GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _piece_bytes(written: str, kind: Kind) -> bytes:
    if kind == "byte_level":
        if all(sign in _ALPHABET for sign in written):
            return bytes(_ALPHABET[sign] for sign in written)
        return written.encode()  # an added token that is in the vocabulary too
    if kind == "sentencepiece":
        byte = _BYTE_PIECE.fullmatch(written)
        return bytes([int(byte[1], 16)]) if byte else written.replace(_SPACE, " ").encode()
    return written.encode()
