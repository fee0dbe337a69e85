"""Where an answer ends and what text of it is graded: one rule for rollouts and for students that are measured.

An answer and its reference end before the first end mark: what prepare has put behind each document, the end token of
the tokenizer, or what the model's settings name as an end where the tokenizer knows it as a special token. Their texts
are what stands before it, special tokens left out. A reference without an end mark (the store has none, or the document
was cut) sets the length: nothing else would end an answer at the right place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

Decode = Callable[[Sequence[int]], str]


def end_ids_of(suffix: Iterable[int], tokenizer: Any | None, settings: Iterable[Any] = ()) -> frozenset[int]:
    """Ids that end an answer.

    suffix: of each document of the store. tokenizer: of transformers, None where ids stand for no text. settings: of
    the model, its text config and its generation config, whose default of a class is some word to another tokenizer.
    """
    found = set(suffix)
    if tokenizer is not None:
        added = tokenizer.added_tokens_decoder.items() if hasattr(tokenizer, "added_tokens_decoder") else ()
        special = {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}
        ends = [tokenizer.eos_token_id, *(end for one in settings for end in _ends(one))]
        found |= {end for end in ends if end in special}
    return frozenset(int(end) for end in found)


def _ends(settings: Any) -> list[int]:
    ends = getattr(settings, "eos_token_id", None)
    return list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [ends]


def decoder(tokenizer: Any) -> Decode:
    """The text of ids by a tokenizer of transformers, special tokens left out."""
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def first_end(ids: Iterable[int], end_ids: Collection[int]) -> int | None:
    """Place of the first id that is an end, None without one."""
    return next((place for place, token in enumerate(ids) if token in end_ids), None)


def answer_limit(most: int, *, reference: int, has_end: bool) -> int:
    """Tokens of an answer, at most `most`; `reference`: how many its reference has, with its end or without one."""
    return most if has_end else min(most, reference)
