"""`potstill dump --ray`: one process that hands out the units of a store to actors that come and go.

It holds no model. What is committed is in the store; the driver adds the order of the work, the progress of all of it
in one place, and what is done when an actor, a node or a unit fails. Killed and started again it asks the store.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from potstill.common.errors import FORESEEN_ERRORS, ConfigError, UserError
from potstill.common.progress import Progress
from potstill.launch.on_ray.cluster import Cluster, describe, is_alive
from potstill.launch.on_ray.schedule import Schedule
from potstill.launch.on_ray.teacher_actor import TeacherActor
from potstill.teacher_dump.config import DumpConfig
from potstill.teacher_dump.dumping import DumpJob
from potstill.teacher_dump.engines.table import entry_of
from potstill.teacher_dump.job import StoppedError, WorkerSummary
from potstill.teacher_dump.pipeline import WalkEndedError, WalkTotals
from potstill.teacher_dump.stopping import StopFlag
from potstill.teacher_dump.unit_worker import UnitDone, UnitFailed, add_to, done_before
from potstill.teacher_dump.work import Work, open_work
from potstill.teacher_dump.worker import finish_work

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25  # between two looks at signals and at the cluster, where nothing comes from the actors
SCALE_SECONDS = 2.0
STOP_SECONDS = 10.0  # for the actors to commit what they have computed, before they are ended
LEAVE_SECONDS = 30.0  # after a signal, for all of the driver's end
MOST_FAILED_STARTS = 3  # in a row, while no actor works
MOST_LOSSES = 10  # in a row without a unit committed, or three for each actor
LONGEST_PAUSE_SECONDS = 60.0
_MOST_TEXT = 500


@dataclass
class _Actor:
    number: int
    handle: Any
    opening: Any | None  # the answer of `open`, until it came
    node: str = ""
    name: str = "an actor"
    call: Any | None = None  # the stream of answers of `run`, while it runs

    @property
    def is_ready(self) -> bool:
        return self.opening is None


def run_on_ray(cluster: Cluster, config: DumpConfig, rows: NDArray[np.int64] | None) -> WorkerSummary:
    """The whole of one dump; see Runner in teacher_dump/dumping.py. Raises as a worker of `dump` does."""
    engine, parts = config.teacher.engine, config.teacher.tensor_parallel
    if entry_of(engine, parts).is_group:
        split = f" and tensor_parallel={parts}" if parts > 1 else ""
        raise ConfigError(
            f"--ray with engine {engine}{split}: an actor holds a whole teacher, and this needs a group of ranks that "
            "start and end together; use engine hf in one process, or the SLURM or Kubernetes templates for it"
        )
    if config.worker is not None or config.num_workers is not None:
        raise ConfigError("--ray hands out the units itself: leave --worker and --num-workers out")
    began = time.monotonic()
    work = open_work(config, config.teacher, DumpJob(config, rows))
    units, totals = work.todo(), WalkTotals()
    if units:
        cluster.connect()
        totals = _Driver(cluster, work, rows, units).run()
    return finish_work(work, totals, seconds=time.monotonic() - began)


class _Driver:
    def __init__(self, cluster: Cluster, work: Work, rows: NDArray[np.int64] | None, units: Sequence[int]) -> None:
        import ray

        self._ray, self._cluster, self._work = ray, cluster, work
        self._schedule, self._totals = Schedule(units), WalkTotals()
        self._num_refused = work.num_refused()
        plain = work.config.model_copy(update={"force": False}).model_dump(mode="json")
        resources = {"num_cpus": cluster.options.num_cpus, "num_gpus": cluster.num_gpus()}
        made = ray.remote(TeacherActor).options(**resources, max_restarts=0, max_task_retries=0)
        shared = None if rows is None else ray.put(rows)
        folder = os.getcwd()
        self._make = lambda: made.remote(plain, shared, folder=folder)
        self._actors: list[_Actor] = []
        self._num_made = 0
        self._began = self._began_units = time.monotonic()
        self._failed_starts, self._losses, self._failed_units = 0, 0, set[int]()
        self._next_start = self._next_scale = 0.0
        self._was_enough = False
        self._num_todo = work.num_wanted(units)
        self._progress: Progress | None = None  # from the first actor on: rate and time left are those of the work
        self._context = contextlib.ExitStack()

    def run(self) -> WalkTotals:
        """Do all units that can be done. Raises StoppedError after a signal, and what makes going on useless."""
        with StopFlag(seconds=LEAVE_SECONDS) as stop, self._ended_actors(), self._context:
            try:
                while not self._schedule.is_over:
                    if stop.signal_name is not None:
                        self._stop(stop.signal_name)
                    self._scale()
                    self._hand_out()
                    self._look()
            except KeyboardInterrupt:
                self._stop("SIGINT")
        self._totals.failures |= self._schedule.given_up
        return self._totals

    @contextlib.contextmanager
    def _ended_actors(self) -> Iterator[None]:
        try:
            yield
        finally:
            for actor in self._actors:
                self._ray.kill(actor.handle)
            self._actors.clear()

    def _stop(self, reason: str) -> None:
        """Let the actors commit what they have computed. Raises StoppedError."""
        log.warning("%s received: the actors commit what they have computed and end", reason)
        for actor in self._actors:
            if actor.call is not None:
                self._ray.cancel(actor.call)
        last = [actor.handle.finish.remote() for actor in self._actors if actor.is_ready]
        if last:
            self._ray.wait(last, num_returns=len(last), timeout=STOP_SECONDS)
        raise StoppedError(
            f"{self._work.job.word}: stopped by {reason} after {self._totals.units} units; what is committed is safe, "
            "run the same command again to go on"
        )

    def _scale(self) -> None:
        """Ask for actors where there are too few: those that find no room wait in the cluster, and nobody for them."""
        now, options = time.monotonic(), self._cluster.options
        if now < self._next_scale:
            return
        self._next_scale = now + SCALE_SECONDS
        hung = self._schedule.hung(now)
        for actor in [one for one in self._actors if one.number in hung]:
            self._lost(actor, "it has not answered since others overtook it", by_itself=False)
        num_ready = sum(actor.is_ready for actor in self._actors)
        self._was_enough = self._was_enough or num_ready >= min(options.min_actors, self._schedule.num_left)
        if not self._was_enough and now - self._began > options.wait_seconds:
            raise UserError(
                f"{num_ready} actors are ready after {options.wait_seconds:.0f} s, at least {options.min_actors} are "
                f"wanted (--ray-actors). An actor asks for {describe(self._cluster.asked())}, the cluster has "
                f"{describe(self._cluster.has())}: ask for less (--ray-cpus, --ray-gpus), add nodes, or wait longer "
                "(--ray-wait)"
            )
        most = options.max_actors if options.max_actors is not None else max(1, self._cluster.room())
        wanted = min(most, self._schedule.num_left)
        if now >= self._next_start:
            for _ in range(wanted - len(self._actors)):
                self._start()
        if self._progress is not None:
            self._progress.note(actors=num_ready, waiting=len(self._actors) - num_ready)

    def _start(self) -> None:
        handle = self._make()
        self._actors.append(_Actor(self._num_made, handle, handle.open.remote()))
        self._num_made += 1

    def _hand_out(self) -> None:
        num_ready = sum(actor.is_ready for actor in self._actors)
        for actor in self._actors:
            if not actor.is_ready or actor.call is not None:
                continue
            units = self._schedule.take(actor.number, num_actors=num_ready, now=time.monotonic())
            if units:
                run = actor.handle.run.options(num_returns="streaming")
                actor.call = run.remote(units, self._num_refused)

    def _look(self) -> None:
        """Take the answers that are there, or wait a moment for one."""
        waiting: dict[Any, _Actor] = {}
        for actor in self._actors:
            one = actor.opening if actor.opening is not None else actor.call
            if one is not None:
                waiting[one] = actor
        if not waiting:
            time.sleep(LOOK_SECONDS)
            return
        ready, _ = self._ray.wait(list(waiting), num_returns=1, timeout=LOOK_SECONDS, fetch_local=False)
        for one in ready:
            self._answer(waiting[one])

    def _answer(self, actor: _Actor) -> None:
        try:
            if actor.opening is not None:
                actor.node, actor.name = self._ray.get(actor.opening)
                actor.opening, self._failed_starts = None, 0
                self._next_scale = 0.0
                self._show()
                return
            try:
                told: UnitDone | UnitFailed = self._ray.get(next(actor.call))  # type: ignore[arg-type] # it waits for a call
            except StopIteration:
                self._schedule.ended(actor.number)
                actor.call = None
                return
        except StoppedError as error:
            self._lost(actor, _cause(error), by_itself=False)
        except WalkEndedError as error:
            raise UserError(f"{actor.name}: {_cause(error)}") from error
        except self._ray.exceptions.RayTaskError as error:
            self._erred(actor, error)
        except self._ray.exceptions.RayError as error:
            self._died(actor, error)
        else:
            self._told(actor, told)

    def _show(self) -> None:
        """Begin to tell how far the whole store is."""
        if self._progress is None:
            num_rows = self._work.num_wanted(range(self._work.writer.num_units or 0))
            progress = Progress(num_rows, done=num_rows - self._num_todo, description=self._work.job.word)
            self._progress = self._context.enter_context(progress)
            self._began_units = time.monotonic()

    def _told(self, actor: _Actor, told: UnitDone | UnitFailed) -> None:
        now = time.monotonic()
        if isinstance(told, UnitFailed):
            self._schedule.failed(actor.number, told.unit, told.reason, now=now)
            log.error("unit %d failed in %s: %s", told.unit, actor.name, told.reason)
            self._failed_units.add(told.unit)
            if len(self._failed_units) >= self._work.config.max_consecutive_failures and self._schedule.num_left:
                raise UserError(
                    f"{len(self._failed_units)} units in a row failed, the last one in {actor.name}: unit {told.unit}: "
                    f"{told.reason}. Committed units are safe; remove the cause and run the same command again"
                )
        elif self._schedule.done(actor.number, told.unit, now=now):
            self._count(told)

    def _count(self, done: UnitDone) -> None:
        add_to(self._totals, done)
        self._losses = 0
        self._failed_units.clear()
        self._num_refused += len(done.refused)
        for row, reason in done.refused:
            log.warning("row %d is refused and stored without targets: %s", row, reason)
        assert self._progress is not None
        rate = self._totals.tokens / max(time.monotonic() - self._began_units, 1e-9)
        self._progress.note(tokens_per_second=round(rate))
        self._progress.update(self._work.num_wanted([done.unit]))
        self._work.warn_of_k(done.unit, self._totals)

    def _died(self, actor: _Actor, error: Exception) -> None:
        """An actor's process is gone: of its own, which may be a unit's doing, or with its node."""
        cause = _cause(error)
        if not actor.is_ready:
            self._did_not_start(actor, error, cause)
            return
        by_itself = not getattr(error, "preempted", False) and is_alive(actor.node)
        self._losses += by_itself
        self._lost(actor, cause, by_itself=by_itself)
        self._check_losses(cause)

    def _erred(self, actor: _Actor, error: Exception) -> None:
        """An actor answers with an error that is no unit's: it is replaced, a few times."""
        cause = _cause(error)
        if not actor.is_ready:
            self._did_not_start(actor, error, cause)
            return
        self._losses += 1
        self._lost(actor, cause, by_itself=False)
        self._check_losses(f"{actor.name}: {cause}")

    def _lost(self, actor: _Actor, cause: str, *, by_itself: bool) -> None:
        held = self._schedule.holds(actor.number)
        log.warning("%s is lost (%s); %d units go to others", actor.name, cause, len(held))
        # It may have committed what it did not come to tell: its own answers come no more.
        for unit in held:
            done = done_before(self._work, unit) if self._schedule.is_left(unit) else None
            if done is not None and self._schedule.done(actor.number, unit, now=time.monotonic()):
                self._count(done)
        self._schedule.lost(actor.number, cause, by_itself=by_itself)
        self._take_away(actor)

    def _take_away(self, actor: _Actor) -> None:
        self._ray.kill(actor.handle)
        self._actors.remove(actor)
        self._next_scale = 0.0

    def _did_not_start(self, actor: _Actor, error: Exception, cause: str) -> None:
        self._failed_starts += 1
        self._take_away(actor)
        self._next_start = time.monotonic() + min(LONGEST_PAUSE_SECONDS, 2.0 ** (self._failed_starts - 1))
        log.warning("an actor did not start (%d in a row): %s", self._failed_starts, cause)
        if self._failed_starts >= MOST_FAILED_STARTS and not any(one.is_ready for one in self._actors):
            raise UserError(
                f"{self._failed_starts} actors in a row did not start, the last one: {cause}. An actor needs to see "
                f"the same paths as this command: tokens {self._work.config.tokens}, output {self._work.config.output}"
                f", teacher {self._work.teacher.model}; put them where every node has them (an object store, a "
                "shared file system), and see that the node has the memory for the teacher (--ray-cpus, --ray-gpus "
                "decide how many of them come on a node)"
            ) from error

    def _check_losses(self, cause: str) -> None:
        if self._losses >= max(MOST_LOSSES, 3 * len(self._actors)):
            raise UserError(
                f"{self._losses} actors in a row were lost before a unit was committed, the last one: {cause}. "
                "Committed units are safe; remove the cause and run the same command again"
            )


def _cause(error: Exception) -> str:
    """What was wrong, in a line: Ray tells it with the stack of the process that it came up in."""
    inner = getattr(error, "cause", None)
    if isinstance(inner, FORESEEN_ERRORS):
        return str(inner)
    if isinstance(inner, Exception):
        return f"{type(inner).__name__}: {inner}"
    text = " ".join(str(error).split())
    _, detail, rest = text.partition("Worker exit detail: ")
    if detail:
        return rest.partition(" Some common causes")[0]  # behind them stands advice on Ray's own flags
    return text[:_MOST_TEXT] or type(error).__name__
