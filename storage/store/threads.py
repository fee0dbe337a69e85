"""Work on many files of a store side by side, with the results in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from typing import TypeVar

from potstill.storage.files.folder import StoreFolder
from potstill.storage.files.prefetch import Prefetcher

T = TypeVar("T")
R = TypeVar("R")


def in_threads(folder: StoreFolder, work: Callable[[T], R], items: Iterable[T], *, most: int) -> Iterator[R]:
    """`work` of each item, in the order of the items; at once as many as the place and this machine take, or `most`.

    The first error of a `work` is raised, in that order. What a caller leaves undone (an error, an interrupt) is not
    begun any more, and what is under way holds nobody up: the threads are daemons.
    """
    num_threads = max(1, min(most, max(folder.parallel_reads, os.cpu_count() or 1)))
    waiting = iter(items)
    with closing(Prefetcher[R](num_threads=num_threads, name="potstill-files")) as pool:
        for item in islice(waiting, 2 * num_threads):
            pool.submit([partial(work, item)], _only)
        while len(pool):
            value = pool.take()
            for item in islice(waiting, 1):
                pool.submit([partial(work, item)], _only)
            yield value


def _only(values: list[R]) -> R:
    return values[0]
