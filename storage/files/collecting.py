"""Many objects at once, without the garbage collector looking through all the others again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Pause the collector of cycles, where it is on, for what makes many objects and no cycles.

    It runs after a number of new objects, and a full run looks at every object of the process: where torch and
    transformers are imported that took three quarters of the time to open a store of 95,000 units.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
