"""The loss settings of one optimizer step: the stage's schedules read off at one point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from potstill.student_train.config.stages import Objective, Stage
from potstill.student_train.config.token_policies import TokenSelector
from potstill.student_train.curriculum.schedules import scalar_value


@dataclass(frozen=True)
class TokenChoice:
    """A token selector with its schedules read off: keep `share` of each row, the rest counts `floor`."""

    selector: TokenSelector
    share: float
    floor: float

    @property
    def uses_student(self) -> bool:
        """Whether the choice can only be made inside the forward pass."""
        return self.selector.uses_student

    @property
    def is_uniform(self) -> bool:
        """Whether every position counts fully, so that nothing need be chosen."""
        return self.floor == 1.0 or (self.share == 1.0 and self.selector.entry.kind == "share")


@dataclass(frozen=True)
class StepObjective:
    """alpha * T^2 * KD + ce_weight * CE + z_loss * lse^2, and the choice of positions. T is 1 for side teacher."""

    targets: str | None
    alpha: float
    ce_weight: float
    temperature: float
    temperature_side: str
    divergence: str
    missing_mass: str
    z_loss: float
    options: Mapping[str, float]
    tokens: TokenChoice | None

    @property
    def stores(self) -> frozenset[str]:
        """Names of the stores that this step reads."""
        names = frozenset({self.targets} if self.targets is not None else ())
        return names | (self.tokens.selector.stores() if self.tokens is not None else frozenset())


def step_objective(defaults: Objective, stage: Stage, x: float) -> StepObjective:
    """Read the stage (null fields: `defaults`) at x in [0, 1] of its span.

    A stage without targets, or a moment with alpha 0, is plain next-token training and reads no targets; ce_weight
    null is 1 - alpha there as well.
    """

    def pick(name: str) -> object:
        own = getattr(stage, name)
        return getattr(defaults, name) if own is None else own

    def value(name: str) -> float:
        return scalar_value(pick(name), x)  # type: ignore[arg-type]

    alpha = 0.0 if stage.targets is None else value("alpha")
    weight = pick("ce_weight") if stage.targets is not None else stage.ce_weight
    tokens = None
    if stage.tokens is not None:
        choice = TokenChoice(stage.tokens, scalar_value(stage.tokens.share, x), scalar_value(stage.tokens.floor, x))
        tokens = None if choice.is_uniform or (alpha == 0.0 and stage.tokens.applies_to == "kd") else choice
    needs_targets = alpha > 0.0 or (tokens is not None and tokens.selector.entry.needs_targets)
    return StepObjective(
        targets=stage.targets if needs_targets else None,
        alpha=alpha,
        ce_weight=1.0 - alpha if weight is None else scalar_value(weight, x),  # type: ignore[arg-type]
        temperature=value("temperature"),
        temperature_side=str(pick("temperature_side")),
        divergence=str(pick("divergence")),
        missing_mass=str(pick("missing_mass")),
        z_loss=value("z_loss"),
        options=dict(pick("options")),  # type: ignore[call-overload]
        tokens=tokens,
    )
