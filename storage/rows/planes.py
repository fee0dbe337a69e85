"""Byte planes: which columns each kind of store has, and how ids are cut into bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from potstill.storage.rows.sparse_targets import Int32, UInt8

if TYPE_CHECKING:
    from potstill.storage.store.spec import RunSpec

Axis = Literal["token", "entry", "document"]


@dataclass(frozen=True)
class Plane:
    """One binary column: `width` bytes per token, entry or document; an optional one may be empty in a row."""

    name: str
    axis: Axis
    width: int = 1
    optional: bool = False


def num_id_planes(vocab_size: int) -> int:
    """2 up to 65 536 ids, 3 above (up to 2^24)."""
    return 2 if vocab_size <= 65536 else 3


def planes_of(spec: RunSpec) -> tuple[Plane, ...]:
    """Columns of a store in file order."""
    id_planes = range(num_id_planes(spec.vocab_size))
    if spec.kind == "tokens":
        return (*(Plane(f"token{i}", "token") for i in id_planes), Plane("doc_lens", "document", width=4))
    if spec.kind == "scores":
        names = ("label0", "label1", "label_rank", "entropy0", "entropy1")
        return tuple(Plane(name, "token") for name in names)
    planes = [Plane("count", "token"), *(Plane(f"id{i}", "entry") for i in id_planes)]
    if spec.stores_logprobs:
        planes.append(Plane("val", "entry"))
    if spec.stores_counts:
        planes.append(Plane("draws", "entry"))
    if spec.stores_weights:
        planes.append(Plane("weight", "entry"))
    planes.append(Plane("tail", "token"))
    planes += [Plane(name, "token", optional=True) for name in ("entropy", "label", "label_rank")]
    planes += [Plane(f"tail_at{i}", "token") for i in range(len(spec.temperatures))]
    return tuple(planes)


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
