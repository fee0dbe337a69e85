"""Ordered prefetch by threads: a bounded window of tasks, results in order, errors raised to the consumer."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from potstill.storage.errors import StoreError

T = TypeVar("T")
JOIN_SECONDS = 1.0


class _Task(Generic[T]):
    def __init__(self, work: Callable[[], T]) -> None:
        self.work, self.done = work, threading.Event()
        self.value: T | None = None
        self.error: BaseException | None = None


class Prefetcher(Generic[T]):
    """Runs submitted work on daemon threads; `take` returns results in submission order.

    Threads are daemons, so that an interrupt during a blocked read never keeps the process alive.
    """

    def __init__(self, *, num_threads: int, name: str) -> None:
        self._queue: queue.SimpleQueue[_Task[T] | None] = queue.SimpleQueue()
        self._pending: deque[_Task[T]] = deque()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], T]) -> None:
        """Queue work; the caller bounds the number of pending tasks."""
        task = _Task(work)
        self._pending.append(task)
        self._queue.put(task)

    def __len__(self) -> int:
        return len(self._pending)

    def take(self) -> T:
        """Wait for the oldest task; raises its error here, in the consumer."""
        if self._closed or not self._pending:
            raise StoreError("prefetch: nothing is pending (closed)")
        task = self._pending[0]
        task.done.wait()
        if task.error is not None:
            raise task.error
        self._pending.popleft()
        return task.value  # type: ignore[return-value]  # done without error means value is set

    def close(self) -> None:
        """Drop what is pending and join the threads, waiting at most JOIN_SECONDS in all."""
        self._closed = True
        for task in list(self._pending):
            # A consumer in another thread may be waiting for one of these.
            task.error = task.error or StoreError("prefetch: closed while this batch was awaited")
            task.done.set()
        self._pending.clear()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(JOIN_SECONDS / len(self._threads))

    def _run(self) -> None:
        while (task := self._queue.get()) is not None:
            if self._closed:
                continue
            try:
                task.value = task.work()
            except BaseException as error:  # handed to the consumer, whatever it is
                task.error = error
            task.done.set()
