"""Configuration of the curriculum: the objective, the row selector, stages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.common.config import StrictModel
from potstill.student_train.config.clocks import TargetsClock
from potstill.student_train.config.curves import Scalar, check_bounds
from potstill.student_train.config.row_scores import RowScore
from potstill.student_train.config.sources import check_mix
from potstill.student_train.config.token_policies import TokenSelector
from potstill.student_train.config.weights import Weights

# The keys of potstill.kernels.divergences.DIVERGENCES; a test compares the two.
Divergence = Literal[
    "forward_kl", "reverse_kl", "skew_forward", "skew_reverse", "jsd", "total_variation",
    "mse_logprobs", "mse_probs", "sampled",
]  # fmt: skip
MissingMass = Literal["tail", "renorm", "support", "label", "raw"]
TemperatureSide = Literal["both", "teacher"]  # kernels.settings.TEMPERATURE_SIDES, compared too
OffKd = Literal["nothing", "ce"]  # kernels.settings.OFF_KD, compared too


class Objective(StrictModel):
    """Settings of the loss alpha * T^2 * KD + ce_weight * CE + z_loss * lse^2 (T: the student's temperature)."""

    alpha: Scalar = Field(default=1.0, description="Weight of the distillation term, in [0, 1]")
    ce_weight: Scalar | None = Field(default=None, description="Weight of the label term; null takes 1 - alpha")
    off_kd: OffKd = Field(
        default="nothing",
        description="Positions whose KD is off (not selected for it, no target): ce adds alpha to their ce_weight, so "
        "that with 1 - alpha the label counts fully there; nothing adds nothing",
    )
    temperature: Scalar = Field(
        default=1.0,
        description="Softmax temperature; other than 1 its tail must be stored (missing_mass tail, label, raw)",
    )
    temperature_side: TemperatureSide = Field(
        default="both",
        description="both: of teacher and student, times T^2; teacher: of the targets alone, no T^2 (near 0: argmax)",
    )
    divergence: Divergence = Field(default="forward_kl", description="Divergence on the kept entries and the tail")
    missing_mass: MissingMass = Field(default="tail", description="Where the mass outside the kept entries goes")
    z_loss: Scalar = Field(default=0.0, description="Weight of the squared log-partition")
    options: dict[str, float] = Field(default_factory=dict, description="Constants of the divergence: skew, beta")

    @model_validator(mode="after")
    def _bounds(self) -> Objective:
        _check_objective(self)
        return self


def _check_objective(settings: Objective | Stage) -> None:
    check_bounds("alpha", settings.alpha, low=0.0, high=1.0)
    check_bounds("ce_weight", settings.ce_weight, low=0.0, high=1e6)
    check_bounds("temperature", settings.temperature, low=0.0, high=100.0, open_low=True)
    check_bounds("z_loss", settings.z_loss, low=0.0, high=1e6)


class RowSelector(StrictModel):
    """Which rows a stage trains on: a share of all rows by score, constant within each of `segments` equal parts."""

    score: RowScore = Field(description="The score of a row")
    keep: Literal["highest", "lowest"] = Field(default="highest", description="Which end of the scores is wanted")
    share: Scalar = Field(description="Share of all rows, in (0, 1]; a schedule anneals it over the stage")
    skip: Scalar = Field(default=0.0, description="Share of all rows passed over at the wanted end (a sliding window)")
    segments: int = Field(
        default=8, ge=1, le=1000, description="Parts of the stage; the pool changes only between them"
    )

    @model_validator(mode="after")
    def _bounds(self) -> RowSelector:
        check_bounds("rows.share", self.share, low=0.0, high=1.0, open_low=True)
        check_bounds("rows.skip", self.skip, low=0.0, high=0.99)
        return self


class Stage(StrictModel):
    """A piece of the run. Loss settings that are null come from `objective`."""

    name: str | None = Field(default=None, description="Name in the metrics; null takes stage_0, stage_1, ...")
    until: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Where the stage ends: int = step, float = share of the run; null on the last stage"
    )
    targets: str | None = Field(
        default=None, description="Store of data.targets to learn from; null trains on labels only"
    )
    targets_clock: TargetsClock | None = Field(
        default=None, description="In place of targets: stores of a teacher's checkpoints, one after another"
    )
    alpha: Scalar | None = Field(default=None, description="Overrides objective.alpha")
    ce_weight: Scalar | None = Field(default=None, description="Overrides objective.ce_weight")
    off_kd: OffKd | None = Field(default=None, description="Overrides objective.off_kd")
    temperature: Scalar | None = Field(default=None, description="Overrides objective.temperature")
    temperature_side: TemperatureSide | None = Field(default=None, description="Overrides objective.temperature_side")
    divergence: Divergence | None = Field(default=None, description="Overrides objective.divergence")
    missing_mass: MissingMass | None = Field(default=None, description="Overrides objective.missing_mass")
    z_loss: Scalar | None = Field(default=None, description="Overrides objective.z_loss")
    options: dict[str, float] | None = Field(default=None, description="Overrides objective.options")
    mix: dict[str, float] | None = Field(
        default=None,
        description="Name of a source -> its share of the rows (of the sum); null: each by the number of its rows",
    )
    repeat: bool = Field(
        default=True, description="Whether a row may come a second time in the run; false refuses a run where one would"
    )
    rows: RowSelector | None = Field(default=None, description="Which rows of each source; null takes all")
    tokens: TokenSelector | None = Field(default=None, description="Which token positions; null takes all")
    restart_optimizer: bool = Field(
        default=False, description="Whether the optimizer's moments and step counter start anew at its first step"
    )
    weights: Weights | None = Field(
        default=None, description="What a row or a document counts, mean 1 over each global batch; null: all alike"
    )

    @property
    def distils(self) -> bool:
        """Whether it has targets to learn from."""
        return self.targets is not None or self.targets_clock is not None

    def target_names(self, known: Iterable[str]) -> tuple[str, ...]:
        """The stores that it learns from, at one step or another, of the names in data.targets. Raises ValueError."""
        if self.targets_clock is not None:
            return self.targets_clock.names(known)
        return () if self.targets is None else (self.targets,)

    @model_validator(mode="after")
    def _bounds(self) -> Stage:
        _check_objective(self)
        if self.targets is not None and self.targets_clock is not None:
            raise ValueError(
                "targets and targets_clock are both given; a clock names the stores itself: remove targets"
            )
        if self.mix is not None:
            check_mix(self.mix)
        if self.rows is not None and not self.repeat:
            raise ValueError("repeat false does not go with rows: pools of rows overlap; remove one of the two")
        if not self.distils and self.tokens is not None:
            if self.tokens.entry.needs_targets:
                raise ValueError(f"tokens.policy {self.tokens.policy} needs the stage's targets")
            if self.tokens.applies_to == "kd":
                raise ValueError("tokens.applies_to kd has no effect in a stage without targets; remove the selector")
        self._check_weights()
        return self

    def _check_weights(self) -> None:
        if self.weights is None:
            return
        if not self.distils and self.weights.applies_to == "kd":
            raise ValueError("weights.applies_to kd has no effect in a stage without targets; remove the weights")
        tokens = self.tokens
        if self.weights.of == "document" and tokens is not None and tokens.uses_student and tokens.applies_to == "all":
            raise ValueError(
                "weights.of document beside tokens of the student with applies_to all would make the step's weight "
                "unknown before the forward pass; use weights.of row, tokens.applies_to kd, or a store as tokens.source"
            )
