"""Ranks that hold one teacher together and run the same batches: the first of them works, the others follow it.

The first is a worker like any other: it opens the stores, walks the units and commits them. The others hear of each
step from it over a group of their own (gloo, also beside GPUs): load the teacher, run these lines, end. They open no
store and decide nothing, signals to stop included, and they end as the first does, with its exit code.

A rank that dies closes its connections, which the others notice at once; one whose machine is cut off they wait for as
long as DEEPSPEED_TIMEOUT says inside a pass, and LONGEST_SILENCE between two of them.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from potstill.common.errors import UserError
from potstill.common.lost_ranks import is_lost_rank, lost_rank_text
from potstill.teacher_dump.engines.base import OneProcess
from potstill.teacher_dump.job import StoppedError, WorkerSummary
from potstill.teacher_dump.pipeline import WalkEndedError
from potstill.teacher_dump.placing import WorkerPlace, worker_place
from potstill.teacher_dump.stopping import StopFlag

log = logging.getLogger(__name__)

# Between two passes the first rank may hash the weights on disk, wait for a store far away, or seal one.
LONGEST_SILENCE = timedelta(hours=2)
_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Load:
    """Load the teacher."""


@dataclass(frozen=True)
class Lines:
    """Run the model over these lines."""

    input_ids: np.ndarray  # int64 [B, L]
    position_ids: np.ndarray
    whole: bool  # with its head, not the backbone alone


@dataclass(frozen=True)
class End:
    """The first rank's work is over: what came of it."""

    summary: WorkerSummary | None = None
    stopped: tuple[str, str] | None = None  # what StoppedError says, and its signal
    error: str = ""


class Follower(Protocol):
    """A loaded teacher on a rank that is not the first."""

    def follow(self, lines: Lines) -> None:
        """Take part in a pass of the first rank."""


@dataclass(frozen=True)
class FollowerSummary(WorkerSummary):
    """What a rank tells that had no units of its own."""

    rank: int = 0
    size: int = 1

    def format(self) -> str:
        return (
            f"{self.word}: rank {self.rank} of {self.size} held its part of the teacher of worker {self.worker} of "
            f"{self.num_workers}, whose first rank tells what was done"
        )


class Team:
    """The ranks of one teacher, by torch's default group, and the group in which the first tells the others."""

    def __init__(self, *, number: int, count: int) -> None:
        self.number, self.count = number, count  # this team, and how many the launcher has started
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.working = False  # whether the first works and the others listen to it
        self._listening = True  # whether the others wait for the next word, as far as the first knows
        self._wire = dist.new_group(backend="gloo", timeout=LONGEST_SILENCE)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def tell(self, word: Load | Lines | End) -> None:
        """To all others; returns when they have it."""
        dist.broadcast_object_list([word], src=0, group=self._wire)

    def hear(self) -> Load | Lines | End:
        """The next word of the first rank."""
        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, src=0, group=self._wire)
        word: Load | Lines | End = heard[0]
        return word

    @contextmanager
    def together(self, word: Load | Lines) -> Iterator[None]:
        """What is done inside is done by all ranks at once; the first tells the others of it.

        Raises WalkEndedError on the first where another rank is lost.
        """
        if not self.working:
            raise UserError("tensor_parallel runs in `dump`, `score` and `verify --teacher` only; leave it out here")
        if not self.is_first:
            yield
            return
        try:
            self.tell(word)
            self._listening = False
            yield
            self._listening = True
        except Exception as error:
            if is_lost_rank(error):
                self._listening = False
                raise WalkEndedError(lost_rank_text(error)) from error
            raise

    def wait_for_all(self) -> None:
        """Until all ranks are here: their disks differ by more than a pass may take."""
        dist.monitored_barrier(group=self._wire, timeout=LONGEST_SILENCE)

    def end(self, word: End) -> None:
        """The last word; none where the others are in the middle of something, and see how this process ends."""
        if self._listening:
            self.tell(word)


class TeamRanks(OneProcess):
    """See Ranks. One of them has units."""

    in_step = True

    def __init__(self, team: Team, load: Callable[[], Follower]) -> None:
        self._team, self._load = team, load

    def place(self, worker: int | None, num_workers: int | None) -> WorkerPlace:
        # RANK and WORLD_SIZE count ranks, so only arguments say which of several launches this is.
        launch, team = worker_place(worker or 0, num_workers or 1), self._team
        source = f"{launch.source}, {team.size} ranks for each"
        return WorkerPlace(launch.worker * team.count + team.number, launch.num_workers * team.count, source)

    def run(self, work: Callable[[], WorkerSummary]) -> WorkerSummary:
        """Work on the first rank; on the others, follow it until it ends, and end alike."""
        self._team.working = True
        try:
            return self._lead(work) if self._team.is_first else self._follow()
        finally:
            self._team.working = False

    def _lead(self, work: Callable[[], WorkerSummary]) -> WorkerSummary:
        try:
            summary = work()
        except StoppedError as error:
            self._end_after_error(End(stopped=(str(error), error.signal_name)))
            raise
        except Exception as error:
            self._end_after_error(End(error=f"{type(error).__name__}: {error}"))
            raise
        self._team.end(End(summary=summary))
        return summary

    def _end_after_error(self, word: End) -> None:
        try:
            self._team.end(word)
        except RuntimeError as error:  # the error that is about to be raised says more
            log.warning("another rank could not be told of the end: %s", lost_rank_text(error))

    def _follow(self) -> WorkerSummary:
        with StopFlag(end=lambda signal_name: None) as stop:  # signals are for the first rank to answer
            try:
                return self._obey()
            except Exception as error:
                if stop.signal_name is not None and is_lost_rank(error):
                    raise StoppedError(f"{stop.signal_name}, and the first rank has ended", stop.signal_name) from error
                raise

    def _obey(self) -> WorkerSummary:
        engine: Follower | None = None
        while True:
            word = self._team.hear()
            if isinstance(word, End):
                return self._answer(word)
            if isinstance(word, Lines):
                assert engine is not None, "the first rank loads the teacher before it runs it"
                engine.follow(word)
            else:
                engine = self._load()

    def _answer(self, end: End) -> WorkerSummary:
        if end.stopped is not None:
            raise StoppedError(*end.stopped)
        if end.summary is None:
            raise UserError(f"the first rank of this teacher ended with an error: {end.error}")
        told = {**vars(end.summary), "units": 0, "rows": 0, "tokens": 0, "refused_rows": (), "stage_seconds": {}}
        return FollowerSummary(**told, rank=self._team.rank, size=self._team.size)


def form_team(size: int, device: torch.device) -> Team:
    """The team of this rank: `size` neighbours of the launcher's ranks. Raises UserError without such a launcher.

    Collective over the team; formed once in a process.
    """
    return _formed(size, device)


@functools.cache
def _formed(size: int, device: torch.device) -> Team:
    if missing := [name for name in _LAUNCHER if name not in os.environ]:
        raise UserError(
            f"tensor_parallel={size} needs a launcher, as in `torchrun --nproc-per-node {size} -m potstill.launch dump "
            f"...`: {', '.join(missing)} are not set"
        )
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world % size:
        raise UserError(
            f"tensor_parallel is {size} and the launcher has started {world} ranks; expected {size} for each worker, "
            f"as in `torchrun --nproc-per-node {size}`"
        )
    timeout = _timeout()
    # The launcher's ranks meet in one store; each team takes a corner of it, and to torch it is the whole world.
    store, _, _ = next(iter(rendezvous("env://", timeout=timeout)))
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "nccl",
        store=dist.PrefixStore(f"teacher_{rank // size}", store),
        rank=rank % size,
        world_size=size,
        timeout=timeout,
        device_id=None if device.type == "cpu" else device,
    )
    return Team(number=rank // size, count=world // size)


def _timeout() -> timedelta:
    text = os.environ.get("DEEPSPEED_TIMEOUT", "10")
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"DEEPSPEED_TIMEOUT is {text!r}; expected whole minutes, 1 or more")
    return timedelta(minutes=int(text))
