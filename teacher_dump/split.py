"""Held-out split by the hash of a document's text: equal texts fall on one side, wherever they stand in the input."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from potstill.common.errors import UserError

_RANGE = 1 << 64


@dataclass(frozen=True)
class Split:
    """A document is held out when its hash is below `threshold` (0 to 2^64)."""

    threshold: int
    salt: str

    def held_out(self, text: str) -> bool:
        """True when this text belongs to the held-out store."""
        return self.threshold > 0 and text_hash(text, salt=self.salt) < self.threshold

    @classmethod
    def by_fraction(cls, fraction: float, *, salt: str) -> Split:
        """Hold out about this share of the documents."""
        return cls(threshold=int(fraction * _RANGE), salt=salt)

    @classmethod
    def by_count(cls, texts: Iterable[str], *, count: int, salt: str) -> Split:
        """Hold out the `count` documents of smallest hash; needs a pass over the texts, and memory for `count` hashes.

        Texts that stand in the input more than once count once, so that all copies fall on one side.
        """
        largest_first: list[int] = []
        held: set[int] = set()
        for text in texts:
            value = text_hash(text, salt=salt)
            if value in held:
                continue
            if len(largest_first) < count:
                heapq.heappush(largest_first, -value)
                held.add(value)
            elif value < -largest_first[0]:
                held.discard(-heapq.heapreplace(largest_first, -value))
                held.add(value)
        if len(largest_first) < count:
            raise UserError(
                f"heldout_documents is {count}, but the input holds only {len(largest_first)} different documents"
            )
        return cls(threshold=-largest_first[0] + 1, salt=salt)


def text_hash(text: str, *, salt: str) -> int:
    """64-bit hash of a text (blake2b keyed by the salt)."""
    key = hashlib.blake2b(salt.encode(), digest_size=32).digest()
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=key).digest(), "little")


def share_of(threshold: int) -> float:
    """Share of all hashes that lie below a threshold."""
    return threshold / _RANGE
