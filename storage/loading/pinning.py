"""Optional hook: put decoded rows into page-locked memory, so that copies to a GPU can overlap with work.

torch is only touched when the caller asks for pinning.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def cuda_is_there() -> bool:
    """True where torch can pin memory for a CUDA device."""
    import torch

    return bool(torch.cuda.is_available())


def pin(value: T) -> T:
    """The same row with every array moved to pinned memory; the arrays stay NumPy views and keep it alive."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(value):  # type: ignore[arg-type]  # rows and SparseTargets are dataclasses
        item = getattr(value, field.name)
        if isinstance(item, np.ndarray):
            changes[field.name] = _pin_array(item)
        elif isinstance(item, dict) and item and all(isinstance(v, np.ndarray) for v in item.values()):
            changes[field.name] = {key: _pin_array(v) for key, v in item.items()}
        elif dataclasses.is_dataclass(item):
            changes[field.name] = pin(item)
    return dataclasses.replace(value, **changes)  # type: ignore[type-var]


def _pin_array(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import torch

    pinned = torch.empty(array.shape, dtype=torch.from_numpy(array[:0].copy()).dtype, pin_memory=True).numpy()
    pinned[...] = array
    return pinned
