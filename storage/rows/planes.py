"""Byte planes: the binary columns of a unit file, and how ids are cut into bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from potstill.storage.rows.array_types import Int32, Int64, UInt8

PlaneAxis = Literal["token", "bit", "entry", "row", "document"]


@dataclass(frozen=True)
class Plane:
    """One binary column: `width` bytes per token, entry, row or document; an optional one may be empty in a row.

    Axis `bit`: one bit per token, ceil(tokens / 8) bytes in a row.
    `skip` is the name by which a reader may leave it undecoded, or None.
    """

    name: str
    axis: PlaneAxis
    width: int = 1
    optional: bool = False
    skip: str | None = None


Count = TypeVar("Count", int, Int64)


def bit_bytes(num_tokens: Count) -> Count:
    """Bytes of one bit per token."""
    return (num_tokens + 7) // 8


def num_id_planes(vocab_size: int) -> int:
    """2 up to 65 536 ids, 3 above (up to 2^24)."""
    return 2 if vocab_size <= 65536 else 3


def split_ids(ids: Int32, num_planes: int) -> list[UInt8]:
    """Little-endian bytes of each id, one array per byte."""
    # The cast keeps the lowest byte.
    return [(ids >> (8 * i) if i else ids).astype(np.uint8) for i in range(num_planes)]


def join_ids(planes: list[UInt8]) -> Int32:
    """Inverse of split_ids."""
    ids: NDArray[np.int32] = planes[-1].astype(np.int32)
    for plane in reversed(planes[:-1]):
        ids <<= 8
        ids |= plane
    return ids
