"""What a run decides on its way. A new kind is a class (legs.Decider) and an entry here."""

from __future__ import annotations

from collections.abc import Callable

from potstill.student_train.config.train import TrainConfig
from potstill.student_train.run.legs import Decider
from potstill.student_train.run.preflight import CheckedRun
from potstill.student_train.run.rescoring import rescoring_decider
from potstill.student_train.run.saturation import saturation_switch

# Each makes its decider of a checked run, or None where the configuration asks for none. They decide in this order.
DECIDERS: dict[str, Callable[[TrainConfig, CheckedRun], Decider | None]] = {
    "rescoring": rescoring_decider,
    "targets_clock": saturation_switch,
}


def build_deciders(config: TrainConfig, checked: CheckedRun) -> tuple[Decider, ...]:
    """The deciders of a run, in their order.

    Raises RuntimeError where the plan waits for a decision that no decider makes, or one decides what no stage asks
    for: a run would otherwise train by figures that nobody made.
    """
    made = (make(config, checked) for make in DECIDERS.values())
    deciders = tuple(decider for decider in made if decider is not None)
    found, needed = {decider.name for decider in deciders}, checked.plan.decisions()
    if found != needed:
        raise RuntimeError(
            f"the stages of this run need the decisions {sorted(needed)}, but {sorted(found)} would be made; DECIDERS "
            f"({__name__}) has {sorted(DECIDERS)}: this is a defect of potstill, please report it"
        )
    return deciders
