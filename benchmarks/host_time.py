"""Time of the thread that drives a training run outside of the engine: what a GPU could be kept waiting by."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from potstill.student_train.run import trainer


class HostClock:
    """Seconds per optimizer step that the driving thread spends outside of forward, backward and step.

    Everything else is in it: taking the batch (and waiting for it), the agreement of the ranks, figures, lines of
    metrics where they fall. Of each step two figures: by the clock, and of a core's work, which other programs on the
    machine do not lengthen.
    """

    def __init__(self) -> None:
        self.steps: list[np.ndarray] = []  # [2] of each optimizer step but the first, which has no step before it
        self._inside = np.zeros(2)
        self._last: np.ndarray | None = None

    def watch(self, engine: Any) -> Any:
        """Time the calls of a DeepSpeed engine from now on. Returns the engine."""
        engine.forward, engine.backward = self._timed(engine.forward), self._timed(engine.backward)
        step = self._timed(engine.step)

        def step_and_close(*args: Any, **options: Any) -> Any:
            is_last = engine.is_gradient_accumulation_boundary()
            found = step(*args, **options)
            if is_last:
                self._end_step()
            return found

        engine.step = step_and_close
        return engine

    @staticmethod
    def _now() -> np.ndarray:
        return np.array([time.perf_counter(), time.thread_time()])

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            started = self._now()
            try:
                return call(*args, **options)
            finally:
                self._inside += self._now() - started

        return timed

    def _end_step(self) -> None:
        now = self._now()
        if self._last is not None:
            self.steps.append(now - self._last - self._inside)
        self._last, self._inside = now, np.zeros(2)


@contextmanager
def host_clock() -> Iterator[HostClock]:
    """A clock for the engine of the run that is trained while this is open."""
    clock, build = HostClock(), trainer.build_engine

    def build_watched(*args: Any, **options: Any) -> Any:
        return clock.watch(build(*args, **options))

    trainer.build_engine = build_watched
    try:
        yield clock
    finally:
        trainer.build_engine = build
