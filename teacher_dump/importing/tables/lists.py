"""Lists of numbers out of Arrow scalars, with their shape looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from potstill.teacher_dump.records.base import BadRecord


def numbers(value: Any, name: str) -> np.ndarray:
    """A list of numbers as an array [n]. Raises BadRecord where it is none, or holds an empty place."""
    items = _items(value, name)
    return _plain(items, name)


def nested_numbers(value: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A list of lists of numbers: their lengths int64 [P], and all numbers in order. Raises BadRecord."""
    outer = _items(value, name)
    if not _is_list(outer.type) or outer.null_count:
        raise BadRecord(f"{name} is not a list of lists at every position (found {outer.type})")
    lengths = pc.list_value_length(outer).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths, _plain(outer.flatten(), name)


def rectangle(value: Any, name: str) -> np.ndarray:
    """A list of lists of one length as a table [P, k]. Raises BadRecord."""
    lengths, flat = nested_numbers(value, name)
    if not len(lengths) or (lengths != lengths[0]).any():
        raise BadRecord(f"{name} has lists of {sorted(set(lengths.tolist()))[:3]} items, expected one length")
    return flat.reshape(len(lengths), int(lengths[0]))


def nested_rectangle(value: Any, name: str) -> np.ndarray:
    """A list of lists of lists, all of one length at each depth, as a table [P, r, k]. Raises BadRecord."""
    outer = _items(value, name)
    if not _is_list(outer.type) or outer.null_count or not len(outer):
        raise BadRecord(f"{name} is not a list of lists of lists (found {outer.type})")
    parts = set(pc.list_value_length(outer).to_pylist())
    inner = outer.flatten()
    if len(parts) != 1 or not _is_list(inner.type) or inner.null_count:
        raise BadRecord(f"{name} has {sorted(parts)[:3]} lists at a position, expected one number of them")
    widths = set(pc.list_value_length(inner).to_pylist())
    if len(widths) != 1:
        raise BadRecord(f"{name} has lists of {sorted(widths)[:3]} items, expected one length")
    return _plain(inner.flatten(), name).reshape(len(outer), parts.pop(), widths.pop())


def _items(value: Any, name: str) -> Any:
    if not _is_list(value.type):
        raise BadRecord(f"{name} is {value.type}, expected a list")
    items = value.values
    if items is None:
        raise BadRecord(f"{name} is empty (null)")
    return items


def _plain(items: Any, name: str) -> np.ndarray:
    if pa.types.is_boolean(items.type):
        items = items.cast(pa.int8())
    if not (pa.types.is_integer(items.type) or pa.types.is_floating(items.type)) or items.null_count:
        found = f"{items.null_count} empty places" if items.null_count else str(items.type)
        raise BadRecord(f"{name} holds {found}, expected numbers")
    plain: np.ndarray = items.to_numpy(zero_copy_only=False)
    return plain


def _is_list(kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
