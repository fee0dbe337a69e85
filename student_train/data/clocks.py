"""The clocks of a run's stages, with the teacher's steps that the stores know themselves."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from potstill.storage import Source, StoreReader
from potstill.student_train.config.sources import target_names
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.curriculum.clock import StageClock, stage_clock

# What names of checkpoints end with, as the trainers in use write them: step_00000800, checkpoint-500, step1000.
STEP_IN_NAME = re.compile(r"(?:step|steps|checkpoint|ckpt|iter|iteration)[-_=]?(\d+)$", re.IGNORECASE)


def recorded_step(store: StoreReader) -> int | None:
    """The step of the teacher's training that a targets store is of, as its run.json says it; None: it does not.

    That is `checkpoint_step` of its teacher, or the number that ends the teacher's name (its folder, or its revision).
    """
    teacher = store.spec.teacher or {}
    if "checkpoint_step" in teacher:
        return int(teacher["checkpoint_step"])
    found = STEP_IN_NAME.search(str(teacher.get("id", "")))
    return None if found is None else int(found[1])


def stage_clocks(config: TrainConfig, sources: Sequence[Source]) -> dict[int, StageClock]:
    """The clocks by number of the stage. Raises UserError that names key and store."""

    def recorded(names: Sequence[str]) -> dict[str, dict[str, int | None]]:
        return {
            source.name: {name: recorded_step(source.joined[name]) for name in names if name in source.joined}
            for source in sources
        }

    return _clocks(config, recorded)


def configured_clocks(config: TrainConfig) -> dict[int, StageClock]:
    """The clocks as the configuration alone has them, before the stores are there.

    Raises UserError where it leaves a step to its store.
    """
    return _clocks(config, lambda names: {})


def _clocks(
    config: TrainConfig, recorded: Callable[[Sequence[str]], Mapping[str, Mapping[str, int | None]]]
) -> dict[int, StageClock]:
    found: dict[int, StageClock] = {}
    for number, stage in enumerate(config.curriculum):
        if stage.targets_clock is not None:
            names = target_names(stage, config.data.named_sources(), key=f"curriculum.{number}")
            key = f"curriculum.{number}.targets_clock"
            found[number] = stage_clock(stage.targets_clock, names, recorded(names), key=key)
    return found
