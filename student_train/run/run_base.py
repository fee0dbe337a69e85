"""What every part of a run works with: configuration, place among the ranks, engine, plan, and the loop's state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.student_train.config.train import TrainConfig
from potstill.student_train.curriculum.plan import CurriculumPlan
from potstill.student_train.run.engine import Topology
from potstill.student_train.run.legs import Legs
from potstill.student_train.run.loop_state import LoopState
from potstill.student_train.run.run_lock import RunLock


@dataclass(frozen=True)
class RunBase:
    """Fixed from the start of the run; `state` changes step by step, the plan in `legs` where something is decided."""

    config: TrainConfig
    topology: Topology
    engine: Any  # of DeepSpeed, around the student
    legs: Legs
    state: LoopState
    lock: RunLock  # on the run folder

    @property
    def folder(self) -> Path:
        return self.config.run.output_dir

    @property
    def plan(self) -> CurriculumPlan:
        """The plan of the leg that the run is in; of the steps before it this may say what was not so."""
        return self.legs.plan
