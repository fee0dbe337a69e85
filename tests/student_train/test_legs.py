"""Legs of a run: what is decided at a step changes the plan behind it, and nothing is read ahead over that step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from potstill.common.errors import UserError
from potstill.storage import Loader
from potstill.student_train.curriculum.plan import CurriculumPlan
from potstill.student_train.data.step_batch import BatchFinisher, StepBatch
from potstill.student_train.data.stores import build_plan, open_stores
from potstill.student_train.run.engine import Topology
from potstill.student_train.run.legs import DecisionPoint, Legs
from potstill.student_train.run.loop_state import LoopState
from potstill.student_train.run.run_base import RunBase
from potstill.student_train.run.run_lock import RunLock
from tests.student_train import tiny, workers

CPU = torch.device("cpu")
STEPS, EVERY = 7, 3


class MovedPlan:
    """A plan whose rows are moved on by some; it notes of which batches it was asked."""

    def __init__(self, plan: CurriculumPlan, offset: int) -> None:
        self._plan, self.offset, self.asked = plan, offset, set[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plan, name)

    def rows(self, batch: int) -> NDArray[np.int64]:
        self.asked.add(batch)
        return (self._plan.rows(batch) + self.offset) % 40


class Mover:
    """Moves all rows by ten times the step at which it decides."""

    name = "mover"

    def __init__(self) -> None:
        self.decided_step: int | None = None
        self.plans: dict[int, MovedPlan] = {}

    def next_step(self, step: int) -> int | None:
        return -(-step // EVERY) * EVERY

    def decide(self, at: DecisionPoint) -> dict[str, Any] | None:
        self.decided_step = at.step
        return {"offset": 10 * at.step} if at.step else None

    def in_plan(self, plan: CurriculumPlan) -> CurriculumPlan:
        assert self.decided_step is not None
        moved = self.plans[self.decided_step] = MovedPlan(plan, 10 * self.decided_step)
        return moved  # type: ignore[return-value]

    def write(self, folder: Path) -> dict[str, Any]:
        return {"step": self.decided_step}

    def read(self, folder: Path, saved: Mapping[str, Any]) -> None:
        self.decided_step = saved["step"]


class Walk:
    """The legs of a small run, walked through as the train loop does, without a model."""

    def __init__(self, stores: dict[str, Path], output: Path, mover: Mover | None) -> None:
        config = workers.config_of(tiny.config_tree(stores, output, run={"max_steps": STEPS}))
        opened = open_stores(config)
        self.plan = build_plan(config, opened)

        def open_loader(plan: CurriculumPlan, first: int, end: int) -> Loader[StepBatch]:
            finisher = BatchFinisher(plan=plan, micro_batch_rows=2, row_length=tiny.ROW_LENGTH, terms=(), device=CPU)
            joined = dict(opened.joined)
            ends = {"first_batch": first, "end_batch": end, "prefetch_batches": 4}
            return Loader(plan, opened.tokens, joined, finish=finisher, **ends)

        self.legs = Legs(self.plan, open_loader, deciders=[] if mover is None else [mover], device=CPU)
        self.base = RunBase(config, Topology(0, 1, CPU), None, self.legs, LoopState(), RunLock(output, ()))
        self.figures: list[tuple[str, dict[str, Any]]] = []

    def go(self, *, end: int = STEPS) -> list[str]:
        """Digests of the rows of each step up to `end`, from where the state stands."""
        found, state = [], self.base.state
        if self.legs.is_due(state.step):
            self.figures += self.legs.decide(DecisionPoint(self.base))
        for batch in self.legs:
            assert list(self.legs.on_device(batch)) == batch.micros
            found.append(batch.rows_digest)
            self.legs.commit(batch.batch)
            state.step += 1
            if self.legs.is_due(state.step):
                self.figures += self.legs.decide(DecisionPoint(self.base))
            if state.step == end:
                break
        return found


def test_what_is_decided_holds_from_its_step_on_and_nothing_is_read_over_it(stores, tmp_path: Path) -> None:
    from potstill.student_train.curriculum.plan import rows_digest

    mover = Mover()
    walk = Walk(stores, tmp_path / "run", mover)
    walk.legs.start(0)
    found = walk.go()
    walk.legs.close()
    wanted = [rows_digest((walk.plan.rows(b) + 10 * (b // EVERY * EVERY)) % 40) for b in range(STEPS)]
    assert found == wanted
    assert {step: plan.asked for step, plan in mover.plans.items()} == {0: {0, 1, 2}, 3: {3, 4, 5}, 6: {6}}
    assert walk.figures == [("mover", {"offset": 30}), ("mover", {"offset": 60})]
    assert not walk.legs.is_due(STEPS), "no step follows that it would be for"


@pytest.mark.parametrize("stopped", [2, 3])
def test_a_resumed_run_keeps_what_was_decided(stores, tmp_path: Path, stopped: int) -> None:
    whole, before = Walk(stores, tmp_path / "run", Mover()), Walk(stores, tmp_path / "run", Mover())
    whole.legs.start(0)
    before.legs.start(0)
    first = before.go(end=stopped)
    manifest = {"data": before.legs.state_dict(), "decisions": before.legs.write(tmp_path)}
    before.legs.close()
    after = Walk(stores, tmp_path / "run", Mover())
    after.base.state.step = stopped
    after.legs.resume(stopped, tmp_path, manifest)
    assert [*first, *after.go()] == whole.go()
    assert [*before.figures, *after.figures] == whole.figures
    for walk in (whole, after):
        walk.legs.close()
    with pytest.raises(UserError, match="holds nothing of mover, which the configuration asks for"):
        Walk(stores, tmp_path / "run", Mover()).legs.resume(stopped, tmp_path, {"data": manifest["data"]})


def test_a_run_without_deciders_is_one_leg(stores, tmp_path: Path) -> None:
    walk = Walk(stores, tmp_path / "run", None)
    walk.legs.start(0)
    assert len(walk.go(end=STEPS + 5)) == STEPS
    assert walk.legs.write(tmp_path) == {}
    walk.legs.close()
