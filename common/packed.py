"""Packed rows and the attention of transformers: in which shape positions that restart keep documents apart."""

from __future__ import annotations

from typing import Any, Protocol, Self, TypeVar


class Reshapes(Protocol):
    """A tensor, as far as this module needs to know (importing torch here would cost every command seconds)."""

    def reshape(self, *shape: int) -> Self: ...

    def __mul__(self, other: int) -> Self: ...

    def __add__(self, other: int) -> Self: ...

    def __mod__(self, other: int) -> Self: ...


Ids = TypeVar("Ids", bound=Reshapes)


def as_lines(config: Any, input_ids: Ids, position_ids: Ids) -> tuple[Ids, Ids]:
    """input_ids and position_ids [B, L] in the shape that the model's attention needs: themselves, or [1, B * L].

    transformers builds a mask from restarting positions for eager, sdpa and flex attention. Its flash attention takes
    no mask, and looks for restarts in a batch of one line only: with more lines it would let documents attend to each
    other without a word (`_is_packed_sequence` in its modeling_flash_attention_utils). As one line the rows stay
    apart, since each begins at position 0, and flash attention costs no more for it. `config` is the model's.
    """
    if takes_one_line(config):
        return input_ids.reshape(1, -1), position_ids.reshape(1, -1)
    return input_ids, position_ids


def takes_one_line(config: Any) -> bool:
    """Whether the attention of the model of this `config` tells documents apart in a batch of one line only.

    Such a line may be of any length: padding between the rows can be left out of it.
    """
    return "flash" in str(getattr(config.get_text_config(), "_attn_implementation", None))


def probe_ids(places: Ids, vocab_size: int) -> Ids:
    """A token id for each number of `places`, spread over the vocabulary: what models are tried on before real text."""
    return (places * 7919 + 13) % vocab_size
