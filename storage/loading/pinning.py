"""Optional hook: put decoded rows into page-locked memory, so that copies to a GPU can overlap with work.

torch is only touched when the caller asks for pinning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import numpy as np

T = TypeVar("T")


def cuda_is_there() -> bool:
    """True where torch can pin memory for a CUDA device."""
    import torch

    return bool(torch.cuda.is_available())


def pin(value: T, *, page_locked: bool = True) -> T:
    """A copy of rows or targets with every array in page-locked memory; the arrays are NumPy views that keep it alive.

    Dataclasses and maps are copied through, whatever arrays they hold. `page_locked` needs a CUDA device; without it
    the copy lies in ordinary memory.
    """
    if isinstance(value, np.ndarray):
        return cast(T, _copied(value, page_locked))
    if isinstance(value, Mapping):
        return cast(T, {key: pin(item, page_locked=page_locked) for key, item in value.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {
            field.name: pin(getattr(value, field.name), page_locked=page_locked) for field in dataclasses.fields(value)
        }
        return cast(T, dataclasses.replace(value, **changes))
    return value


def _copied(array: np.ndarray[Any, Any], page_locked: bool) -> np.ndarray[Any, Any]:
    import torch

    dtype = torch.from_numpy(array[:0].copy()).dtype
    copy = torch.empty(array.shape, dtype=dtype, pin_memory=page_locked).numpy()
    copy[...] = array
    return copy
