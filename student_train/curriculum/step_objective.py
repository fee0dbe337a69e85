"""The loss settings of one optimizer step: the stage's schedules read off at one point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from potstill.kernels.settings import LossSettings
from potstill.student_train.config.stages import Objective, Stage
from potstill.student_train.config.token_policies import TokenSelector
from potstill.student_train.config.weights import Weights
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
    """What a step trains on: alpha * T^2 * KD + ce_weight * CE + z_loss * lse^2, the choice of positions, weights.

    targets: name of the store that the step learns from; None where it reads none.
    settings: of the loss, without a head's cap and scale. A stage without targets has label terms only.
    tokens: the choice of positions; None takes all. weights: of rows or documents; None: all alike.
    """

    targets: str | None
    settings: LossSettings
    tokens: TokenChoice | None
    weights: Weights | None = None

    @property
    def stores(self) -> frozenset[str]:
        """Names of the stores that this step reads."""
        names = frozenset({self.targets} if self.targets is not None else ())
        names |= frozenset({self.weights.store} if self.weights is not None else ())
        return names | (self.tokens.selector.stores() if self.tokens is not None else frozenset())


def stage_value(defaults: Objective, stage: Stage, name: str) -> Any:
    """A loss setting of a stage as the configuration has it, a schedule maybe: its own, or else the default."""
    own = getattr(stage, name)
    return getattr(defaults, name) if own is None else own


def distillation_settings(defaults: Objective, stage: Stage, *, temperature: float, **weights: Any) -> LossSettings:
    """Settings of a stage with targets at one temperature; weights: alpha, ce_weight, z_loss of LossSettings.

    Raises KernelInputError where they do not go together.
    """
    return LossSettings(
        temperature=temperature,
        off_kd=stage_value(defaults, stage, "off_kd"),
        temperature_side=stage_value(defaults, stage, "temperature_side"),
        divergence=stage_value(defaults, stage, "divergence"),
        divergence_options=stage_value(defaults, stage, "options"),
        missing_mass=stage_value(defaults, stage, "missing_mass"),
        **weights,
    )


def step_objective(defaults: Objective, stage: Stage, x: float, *, targets: str | None = None) -> StepObjective:
    """Read the stage (null fields: `defaults`) at x in [0, 1] of its span. Raises KernelInputError.

    `targets`: the store that a stage with a clock learns from here.
    A stage without targets, or a moment with alpha 0, is plain next-token training and reads no targets; ce_weight
    null is 1 - alpha there as well.
    """

    def value(name: str) -> float:
        return scalar_value(stage_value(defaults, stage, name), x)

    alpha = value("alpha") if stage.distils else 0.0
    ce_weight = stage_value(defaults, stage, "ce_weight") if stage.distils else stage.ce_weight
    factors: dict[str, Any] = {
        "alpha": alpha,
        "ce_weight": None if ce_weight is None else scalar_value(ce_weight, x),
        "z_loss": value("z_loss"),
    }
    if not stage.distils:
        settings = LossSettings(**factors)
    else:
        settings = distillation_settings(defaults, stage, temperature=value("temperature"), **factors)
    tokens = None
    if stage.tokens is not None:
        choice = TokenChoice(stage.tokens, scalar_value(stage.tokens.share, x), scalar_value(stage.tokens.floor, x))
        tokens = None if choice.is_uniform or (alpha == 0.0 and stage.tokens.applies_to == "kd") else choice
    weights = stage.weights
    if weights is not None and weights.applies_to == "kd" and alpha == 0.0:
        weights = None
    needs_targets = alpha > 0.0 or (tokens is not None and tokens.selector.entry.needs_targets)
    store = stage.targets if targets is None else targets
    return StepObjective(targets=store if needs_targets else None, settings=settings, tokens=tokens, weights=weights)
