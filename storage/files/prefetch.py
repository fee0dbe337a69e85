"""Ordered prefetch by threads: a bounded window of tasks, results in order, errors raised to the consumer."""

from __future__ import annotations

import functools
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from potstill.storage.errors import StoreError
from potstill.storage.files.waiting import POLL_SECONDS, check_waits, stuck_read, watch_this_thread

P = TypeVar("P")  # what a part gives
T = TypeVar("T")  # what a task gives
JOIN_SECONDS = 1.0


class _Task(Generic[T]):
    """Parts that any threads work on, and what is made of their results by the thread that ends the last of them.

    No thread ever waits for another one's part, so that one thread alone gets through as well.
    """

    def __init__(self, parts: Sequence[Callable[[], Any]], finish: Callable[[list[Any]], T]) -> None:
        self._parts, self._finish = parts, finish
        self._results: list[Any] = [None] * len(parts)
        self._errors: list[BaseException | None] = [None] * len(parts)
        self._num_left, self._lock = len(parts), threading.Lock()
        self.done = threading.Event()
        self.value: T | None = None
        self.error: BaseException | None = None

    def jobs(self) -> list[Callable[[], None]]:
        """What is to be run, each once and by any thread; a task without parts is only finished."""
        return [functools.partial(self._run_part, number) for number in range(len(self._parts))] or [self._end]

    def _run_part(self, number: int) -> None:
        try:
            self._results[number] = self._parts[number]()
        except BaseException as error:  # handed to the consumer, whatever it is
            self._errors[number] = error
        with self._lock:
            self._num_left -= 1
            is_last = self._num_left == 0
        if is_last:
            self._end()

    def _end(self) -> None:
        # The first in the order of the parts, so that the same damage is always told by the same error.
        error = next((found for found in self._errors if found is not None), None)
        if error is None and not self.done.is_set():  # closed meanwhile: nobody wants the result
            try:
                self.value = self._finish(self._results)
            except BaseException as caught:
                error = caught
        self.error = self.error or error
        self.done.set()


class Prefetcher(Generic[T]):
    """Runs submitted tasks on daemon threads; `take` returns results in submission order.

    Threads are daemons, so that an interrupt during a blocked read never keeps the process alive. Whoever waits in
    `take` looks after the reads of the threads: one that does not come back ends the wait.
    """

    def __init__(self, *, num_threads: int, name: str) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pending: deque[_Task[T]] = deque()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()
        self._idents = frozenset(thread.ident or 0 for thread in self._threads)

    def submit(self, parts: Sequence[Callable[[], P]], finish: Callable[[list[P]], T]) -> None:
        """Queue a task: `parts` run side by side, then `finish` gets their results in order, in a thread as well.

        The caller bounds the number of pending tasks.
        """
        task = _Task(parts, finish)
        self._pending.append(task)
        for job in task.jobs():
            self._queue.put(job)

    def __len__(self) -> int:
        return len(self._pending)

    def take(self) -> T:
        """Wait for the oldest task; raises its error here, in the consumer. The next call is for the next task.

        Raises HungReadError, or StoppedReadError after a signal, where a read of the threads does not come back.
        """
        if self._closed or not self._pending:
            raise StoreError("prefetch: nothing is pending (closed)")
        task = self._pending[0]
        while not task.done.wait(POLL_SECONDS):
            check_waits(self._idents)
        if self._pending:  # none where it was closed meanwhile
            self._pending.popleft()
        if task.error is not None:
            raise task.error
        return task.value  # type: ignore[return-value]  # done without error means value is set

    def close(self) -> None:
        """Drop what is pending and join the threads, at most JOIN_SECONDS in all; a stuck one is not waited for."""
        self._closed = True
        for task in list(self._pending):
            # A consumer in another thread may be waiting for one of these.
            task.error = task.error or StoreError("prefetch: closed while this batch was awaited")
            task.done.set()
        self._pending.clear()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            if stuck_read(threads={thread.ident or 0}) is None:
                thread.join(JOIN_SECONDS / len(self._threads))

    def _run(self) -> None:
        watch_this_thread()
        while (job := self._queue.get()) is not None:
            if not self._closed:
                job()


def in_parallel(works: Sequence[Callable[[], T]], *, num_threads: int) -> list[T]:
    """Results of all `works` in their order, done by `num_threads` daemon threads; the first error in it is raised."""
    pool: Prefetcher[T] = Prefetcher(num_threads=num_threads, name="potstill-reads")
    try:
        for work in works:
            pool.submit([work], lambda found: found[0])
        return [pool.take() for _ in works]
    finally:
        pool.close()
