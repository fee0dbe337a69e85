"""Tokens as text that can be read: characters that are cut over several tokens stand whole where they end."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from potstill.common.token_table import TokenTable


def row_texts(tokens: Sequence[int], doc_lens: Sequence[int], table: TokenTable | None) -> list[str]:
    """Text of each token, so that the texts of a document joined are its text.

    A token that ends inside a character gets what is whole before it (maybe nothing, ""), and the token that completes
    the character shows it. Bytes that are no UTF-8 stand as `\\xNN`. Without a table the texts are the ids.
    """
    if table is None:
        return [str(token) for token in tokens]
    texts: list[str] = []
    start = 0
    for size in doc_lens:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="backslashreplace")
        for n, token in enumerate(tokens[start : start + size], start=1):
            texts.append(decoder.decode(table.piece(token), final=n == size))
        start += size
    return texts


def piece_text(token: int, table: TokenTable | None) -> str:
    """Text of one token by itself; bytes that are no whole character stand as `\\xNN`."""
    return str(token) if table is None else table.piece(token).decode("utf-8", errors="backslashreplace")
