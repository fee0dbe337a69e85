"""Legs of a run: between two of them it is decided anew what is trained on, from what the run has come to by then.

The loader's threads read ahead, so nothing that they have made may be used behind a step at which the plan changes.
A run is therefore cut into legs: the batches [first, end) of a leg come from one plan, through a loader that reads up
to `end` and no further. Before step `end` is trained, and before a checkpoint of it is written, each `Decider` that is
due decides (a collective call with one answer for all ranks), the plan takes that in, and a loader is opened for the
next leg. A run without deciders is one leg.

What was decided is part of every checkpoint behind it. A resumed run reads it before it makes a plan, and decides again
only where the next decision is due: it sees what the run that was not stopped has seen, at any number of ranks.

A new kind of decision is a class with the methods of `Decider` and an entry in DECIDERS of run/deciders.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from potstill.common.errors import UserError
from potstill.storage import Loader
from potstill.student_train.curriculum.plan import CurriculumPlan
from potstill.student_train.data.batch import MicroBatch
from potstill.student_train.data.step_batch import StepBatch
from potstill.student_train.run.device_batches import DeviceBatches

if TYPE_CHECKING:
    from potstill.student_train.run.run_base import RunBase


@dataclass(frozen=True)
class DecisionPoint:
    """Where the run stands: `run.state.step` steps are done and judged, `run.plan` is the plan that was trained on.

    heldout: the figures of the evaluation behind the last step, the same on all ranks; None where there was none.
    """

    run: RunBase
    heldout: Mapping[str, Any] | None = None

    @property
    def step(self) -> int:
        """The step that is trained next."""
        return self.run.state.step


class Decider(Protocol):
    """Something that is decided at some steps of a run, and that the plan of the steps behind depends on."""

    @property
    def name(self) -> str:
        """Of its entry in a checkpoint's manifest, and kind of its lines of metrics."""

    @property
    def decided_step(self) -> int | None:
        """The step before which it decided last, None before the first time; `write` and `read` carry it."""

    def next_step(self, step: int) -> int | None:
        """The first step from `step` on before which it decides; None: never again. The same on all ranks."""

    def decide(self, at: DecisionPoint) -> dict[str, Any] | None:
        """Decide, in a collective call with the same outcome on all ranks; sets decided_step.

        Returns the figures of a line of metrics, or None for no line. Raises UserError on all ranks.
        """

    def in_plan(self, plan: CurriculumPlan) -> CurriculumPlan:
        """The plan with what was decided last; of a run's plan as its configuration has it, or of other deciders."""

    def write(self, folder: Path) -> dict[str, Any]:
        """JSON for the checkpoint's manifest; more may go into files of `folder` (rank 0 only, before the commit)."""

    def read(self, folder: Path, saved: Mapping[str, Any]) -> None:
        """Take back what `write` has written, on every rank. Raises UserError that names the file."""


class Legs:
    """Iterator over the step batches of a run, leg by leg, and the plan that they come from."""

    def __init__(
        self,
        plan: CurriculumPlan,
        open_loader: Callable[[CurriculumPlan, int, int], Loader[StepBatch]],
        *,
        deciders: Sequence[Decider] = (),
        device: torch.device,
    ) -> None:
        """`plan`: as the configuration has it; `open_loader(plan, first, end)` gives the steps [first, end)."""
        self.plan = plan
        self._undecided, self._open_loader, self._device = plan, open_loader, device
        self._deciders = tuple(deciders)
        self._loader: Loader[StepBatch] | None = None
        self._batches: DeviceBatches | None = None
        self._waited_seconds = 0.0  # in the legs that are over

    def start(self, step: int) -> None:
        """Stand before `step`, with what was decided so far."""
        self.close()
        if self._batches is not None:
            self._waited_seconds += self._batches.wait_seconds
        self.plan = self._undecided
        for decider in self._deciders:
            if decider.decided_step is not None:
                self.plan = decider.in_plan(self.plan)
        end = self._end(step)
        self._loader = self._open_loader(self.plan, step, end)
        self._batches = DeviceBatches(self._loader, device=self._device, end=end)

    def resume(self, step: int, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Stand where the checkpoint of this folder and manifest stands, before `step`.

        Raises StoreError where it was trained on other data, UserError where it lacks what was decided.
        """
        saved = manifest.get("decisions", {})
        for decider in self._deciders:
            if decider.name not in saved:
                raise UserError(
                    f"{folder}: the checkpoint holds nothing of {decider.name}, which the configuration asks for: it "
                    "is of a run without it; use the run's own configuration, or start a new run"
                )
            decider.read(folder, saved[decider.name])
        self.start(step)
        self._opened.load_state_dict(manifest["data"])

    def is_due(self, step: int) -> bool:
        """Whether something is to be decided before `step` is trained, and was not."""
        return bool(self._due(step))

    def decide(self, at: DecisionPoint) -> list[tuple[str, dict[str, Any]]]:
        """Let those that are due decide (a collective call), and begin the next leg.

        Returns name and figures of each that has a line of metrics.
        """
        found = []
        for decider in self._due(at.step):
            figures = decider.decide(at)
            if figures is not None:
                found.append((decider.name, figures))
        self.start(at.step)
        return found

    def write(self, folder: Path) -> dict[str, Any]:
        """Write what was decided into a checkpoint's folder, and return what its manifest says of that; rank 0 only."""
        return {decider.name: decider.write(folder) for decider in self._deciders}

    def __iter__(self) -> Legs:
        return self

    def __next__(self) -> StepBatch:
        """The next batch. It ends where a leg ends: the next one begins by `decide`."""
        assert self._batches is not None, "the legs of a run were not started"
        return next(self._batches)

    def on_device(self, batch: StepBatch) -> Iterator[MicroBatch]:
        """The micro-batches of the batch that was taken last, on the device, in order. Go through all of them, once."""
        assert self._batches is not None
        return self._batches.on_device(batch)

    @property
    def wait_seconds(self) -> float:
        """Of the driving thread so far: for batches that were not ready, and to enqueue copies."""
        return self._waited_seconds + (0.0 if self._batches is None else self._batches.wait_seconds)

    def commit(self, batch: int) -> None:
        """Say that the optimizer step of `batch` is done."""
        self._opened.commit(batch)

    def state_dict(self) -> dict[str, Any]:
        """JSON state of the loader, equal on all ranks."""
        return self._opened.state_dict()

    def close(self) -> None:
        """Stop the threads of the leg, if one is open."""
        if self._loader is not None:
            self._loader.close()

    @property
    def _opened(self) -> Loader[StepBatch]:
        assert self._loader is not None, "the legs of a run were not started"
        return self._loader

    def _due(self, step: int) -> list[Decider]:
        if step >= self.plan.total_steps:
            return []  # no step follows that it would be for
        return [d for d in self._deciders if d.next_step(step) == step and d.decided_step != step]

    def _end(self, step: int) -> int:
        """End of the leg that begins before `step`."""
        following = [decider.next_step(step + 1) for decider in self._deciders]
        return min([self.plan.total_steps, *(number for number in following if number is not None)])
