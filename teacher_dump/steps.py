"""`dump` and `score` as steps of a pipeline: callables (data, rank, world size), as datatrove takes them.

Executors pickle their steps and load them in other processes. A function of the script that starts them would be
pickled by the name it has there, which no other process knows; these classes are found wherever potstill is installed.
What has to be done is read from the store alone, so a rank may be started again at any time, and with another number
of ranks.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from potstill.common.log import setup_logging
from potstill.teacher_dump.config import DumpConfig, ScoreConfig

if TYPE_CHECKING:
    from potstill.teacher_dump.job import StoppedError, WorkerSummary
    from potstill.teacher_dump.series import SeriesSummary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DumpStep:
    """The share of worker `rank` of `world_size` in a targets store. What comes in passes on when that is done."""

    config: DumpConfig

    def __call__(self, data: Iterable[Any] | None, rank: int, world_size: int) -> Iterator[Any]:
        """Raises what `dump` raises, first of all StoppedError after a signal: the rank is then to be started again."""
        from potstill.teacher_dump.dumping import dump
        from potstill.teacher_dump.early import early_dump

        return _share(lambda: dump(early_dump(self.config), rank, world_size), data, rank)


@dataclass(frozen=True)
class ScoreStep:
    """The same for a scores store."""

    config: ScoreConfig

    def __call__(self, data: Iterable[Any] | None, rank: int, world_size: int) -> Iterator[Any]:
        """Raises what `score` raises, as DumpStep does."""
        from potstill.teacher_dump.early import early_score
        from potstill.teacher_dump.scoring import score

        return _share(lambda: score(early_score(self.config), rank, world_size), data, rank)


@dataclass(frozen=True)
class SealStep:
    """Seal a store once all its units are there; a step of a pipeline of one task behind that of the workers."""

    store: str
    fast: bool = False

    def __call__(self, data: Iterable[Any] | None, rank: int, world_size: int) -> Iterator[Any]:
        """Raises StoreError where units are missing or damaged."""
        from potstill.storage import seal_store

        setup_logging()
        seal_store(self.store, fast=self.fast)
        yield from data or ()


def _share(work: Callable[[], WorkerSummary | SeriesSummary], data: Iterable[Any] | None, rank: int) -> Iterator[Any]:
    """Do a worker's share, then pass on what came in."""
    from potstill.teacher_dump.job import StoppedError

    _enter(rank)
    try:
        summary = work()
    except StoppedError as error:
        _pass_on(error)
        raise
    log.info("%s", summary.format())
    yield from data or ()


def _enter(rank: int) -> None:
    """What a launcher would do for the process: log, and say which GPU of this machine is meant."""
    setup_logging()
    if os.environ.get("DATATROVE_EXECUTOR") == "LOCAL":
        # Its processes see all GPUs and take ranks in order: rank modulo GPUs is what engines make of this.
        os.environ["LOCAL_RANK"] = str(rank)


def _pass_on(error: StoppedError) -> None:
    """Give the signal that stopped the worker to the handler that stood there before: the executor's own.

    datatrove's for SLURM asks the scheduler for another turn. Where there is none, the error alone says it.
    """
    number = getattr(signal, error.signal_name, None)
    if number is not None and callable(signal.getsignal(number)):
        signal.raise_signal(number)
