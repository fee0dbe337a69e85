"""Work on many files of a store side by side, with the results in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from potstill.storage.files.folder import StoreFolder

T = TypeVar("T")
R = TypeVar("R")


def in_threads(folder: StoreFolder, work: Callable[[T], R], items: Iterable[T], *, most: int) -> Iterator[R]:
    """`work` of each item, in the order of the items; at once as many as the place and this machine take, or `most`.

    What a caller leaves undone (an error, an interrupt) is not begun any more.
    """
    num_threads = max(1, min(most, max(folder.parallel_reads, os.cpu_count() or 1)))
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="potstill-files")
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
