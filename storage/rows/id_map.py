"""Frequency-ranked ids (feature `frequency_ids`): a permutation of the vocabulary stored once per store.

Frequent ids get small ranks, so that the high byte plane compresses better (about 7% of a store).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from potstill.storage.errors import CorruptError, StoreError
from potstill.storage.rows.array_types import Int32

ID_MAP_NAME = "id_map.u32"


@dataclass(frozen=True, eq=False)
class IdMap:
    """Both directions of the permutation, [V] int32 each."""

    id_of_rank: Int32
    rank_of_id: Int32

    @classmethod
    def from_frequencies(cls, frequencies: ArrayLike) -> IdMap:
        """Rank ids by descending frequency [V], ties by ascending id."""
        counts = np.asarray(frequencies)
        if counts.ndim != 1 or not counts.size or not np.isfinite(counts.astype(np.float64)).all():
            raise StoreError(f"id frequencies: found shape {counts.shape}, expected one finite number per id")
        return cls._from_order(np.argsort(-counts.astype(np.float64), kind="stable").astype(np.int32))

    @classmethod
    def from_bytes(cls, data: bytes, *, vocab_size: int, sha256: str, where: str) -> IdMap:
        """Read id_map.u32 (little-endian u32 id of each rank); CorruptError unless it is the pinned permutation."""
        if len(data) != 4 * vocab_size or hashlib.sha256(data).hexdigest() != sha256:
            raise CorruptError(f"{where}: {len(data)} bytes do not fit the sha256 that run.json names")
        order = np.frombuffer(data, "<u4").astype(np.int64)
        if not np.array_equal(np.sort(order), np.arange(vocab_size)):
            raise CorruptError(f"{where}: table is not a permutation of the {vocab_size} ids")
        return cls._from_order(order.astype(np.int32))

    @classmethod
    def _from_order(cls, id_of_rank: Int32) -> IdMap:
        rank_of_id = np.empty_like(id_of_rank)
        rank_of_id[id_of_rank] = np.arange(len(id_of_rank), dtype=np.int32)
        return cls(id_of_rank, rank_of_id)

    def to_bytes(self) -> bytes:
        return self.id_of_rank.astype("<u4").tobytes()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()
