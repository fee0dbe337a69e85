"""Configuration of the curriculum: scalars with schedules, the objective, row and token selectors, stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.common.config import StrictModel

# The keys of potstill.kernels.divergences.DIVERGENCES; a test compares the two.
Divergence = Literal[
    "forward_kl", "reverse_kl", "skew_forward", "skew_reverse", "jsd", "total_variation", "mse_logprobs", "sampled"
]
MissingMass = Literal["tail", "renorm", "support", "label", "raw"]
TemperatureSide = Literal["both", "teacher"]  # kernels.settings.TEMPERATURE_SIDES, compared too
DecayShape = Literal["linear", "cosine", "sqrt"]


class Linear(StrictModel):
    """Straight line over the stage."""

    kind: Literal["linear"] = Field(default="linear", description="A straight line")
    start: float = Field(description="Value at the first step of the stage")
    end: float = Field(description="Value at the last step of the stage")


class Cosine(StrictModel):
    """Half a cosine over the stage."""

    kind: Literal["cosine"] = Field(default="cosine", description="Half a cosine")
    start: float = Field(description="Value at the first step of the stage")
    end: float = Field(description="Value at the last step of the stage")


class LinearRatio(StrictModel):
    """A share whose ratio to the rest is a straight line."""

    kind: Literal["linear_ratio"] = Field(default="linear_ratio", description="value / (1 - value) is a straight line")
    start: float = Field(ge=0, lt=1, description="Value at the first step of the stage")
    end: float = Field(ge=0, lt=1, description="Value at the last step of the stage")


class Wsd(StrictModel):
    """Warm-up, stable, decay over the stage."""

    kind: Literal["wsd"] = Field(default="wsd", description="Warm-up, stable, decay")
    start: float = Field(default=0.0, description="Value before the warm-up")
    peak: float = Field(description="Value of the stable phase")
    end: float = Field(default=0.0, description="Value after the decay")
    warmup: float = Field(default=0.1, ge=0, le=1, description="Share of the stage that warms up")
    decay: float = Field(default=0.2, ge=0, le=1, description="Share of the stage that decays")
    decay_shape: DecayShape = Field(default="cosine", description="Shape of the decay")

    @model_validator(mode="after")
    def _fits(self) -> Wsd:
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} + decay {self.decay} is more than the whole stage")
        return self


class Periodic(StrictModel):
    """Whole cosine periods over the stage, to `end` and back to `start` in each."""

    kind: Literal["periodic"] = Field(default="periodic", description="Whole cosine periods")
    start: float = Field(description="Value at the start and the end of each period")
    end: float = Field(description="Value in the middle of each period")
    periods: int = Field(default=1, ge=1, description="Periods in the stage")


Curve = Annotated[Linear | Cosine | LinearRatio | Wsd | Periodic, Field(discriminator="kind")]
Scalar = float | Curve
Span = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)]


def check_bounds(name: str, scalar: Scalar | None, *, low: float, high: float, open_low: bool = False) -> None:
    """Raise ValueError when a scalar can leave [low, high] (or (low, high] with `open_low`)."""
    if scalar is None:
        return
    if isinstance(scalar, int | float):
        corners = [float(scalar)]
    else:
        corners = [scalar.start, scalar.end, *([scalar.peak] if isinstance(scalar, Wsd) else [])]
    for value in corners:
        if not (low <= value <= high) or (open_low and value == low):
            raise ValueError(f"{name} takes the value {value}; it must lie in {'(' if open_low else '['}{low}, {high}]")


class Objective(StrictModel):
    """Settings of the loss alpha * T^2 * KD + ce_weight * CE + z_loss * lse^2 (T: the student's temperature)."""

    alpha: Scalar = Field(default=1.0, description="Weight of the distillation term, in [0, 1]")
    ce_weight: Scalar | None = Field(default=None, description="Weight of the label term; null takes 1 - alpha")
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


class StatRef(StrictModel):
    """One per-row statistic of a scores or targets store."""

    store: str = Field(description="Name in data.scores or data.targets")
    stat: str = Field(default="mean_loss", description="Name of the statistic in the store's index")
    rank_first: Literal["lowest", "highest"] = Field(default="lowest", description="rank_fusion: which end has rank 1")


class RowScore(StrictModel):
    """A number per row, made of one or more statistics."""

    kind: Literal["stat", "difference", "rank_fusion", "random"] = Field(
        default="stat", description="How `of` becomes a score"
    )
    of: tuple[StatRef, ...] = Field(
        default=(), description="stat: one; difference: first minus second; rank_fusion: two or more"
    )
    fusion_k: float = Field(default=60.0, gt=0, description="rank_fusion: sum of 1 / (fusion_k + rank)")

    @model_validator(mode="after")
    def _count(self) -> RowScore:
        need = {"stat": (1, 1), "difference": (2, 2), "rank_fusion": (2, 16), "random": (0, 0)}[self.kind]
        if not need[0] <= len(self.of) <= need[1]:
            raise ValueError(
                f"rows.score.kind {self.kind} takes {need[0]} to {need[1]} statistics, found {len(self.of)}"
            )
        return self


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


TokenPolicyName = Literal[
    "label_rank",
    "top_loss",
    "top_entropy",
    "excess_loss",
    "entropy_band",
    "skip_low_entropy",
    "paced",
    "soft_or",
    "random",
]


class TokenSelector(StrictModel):
    """Which token positions a stage trains on, or how much each counts."""

    policy: TokenPolicyName = Field(description="See tokens.py: one table of policies")
    source: str = Field(
        default="student", description="Whose figures: a store of data.scores or data.targets, or student"
    )
    reference: str | None = Field(default=None, description="excess_loss: store whose loss is taken off")
    share: Scalar = Field(default=1.0, description="Share of each row's labelled positions that is kept, in (0, 1]")
    floor: Scalar = Field(
        default=0.0, description="Weight of the positions that were not chosen, in [0, 1]; 1 is uniform"
    )
    max_rank: int = Field(
        default=10, ge=1, le=255, description="label_rank: keep while the true token is among the first so many"
    )
    low: float | None = Field(default=None, ge=0, description="entropy_band: lowest entropy kept, nats")
    high: float | None = Field(default=None, ge=0, description="entropy_band: highest entropy kept, nats")
    power_a: float = Field(default=1.0, ge=0, description="paced: a of p^a (1-p)^b")
    power_b: float = Field(default=1.0, ge=0, description="paced: b of p^a (1-p)^b")
    applies_to: Literal["all", "kd"] = Field(
        default="all", description="all: the position leaves the loss; kd: only its KD term"
    )

    def stores(self) -> frozenset[str]:
        """Names of the stores whose columns the policy needs."""
        return frozenset({self.source, self.reference or "student"} - {"student"}) - (
            {self.source} if self.policy == "random" else frozenset()
        )

    @model_validator(mode="after")
    def _check(self) -> TokenSelector:
        check_bounds("tokens.share", self.share, low=0.0, high=1.0, open_low=True)
        check_bounds("tokens.floor", self.floor, low=0.0, high=1.0)
        if self.policy == "excess_loss" and self.reference is None:
            raise ValueError("tokens.policy excess_loss needs tokens.reference, the store whose loss is taken off")
        if self.policy == "label_rank" and self.source == "student":
            raise ValueError("tokens.policy label_rank needs tokens.source: a scores or targets store")
        if self.policy == "soft_or" and self.source != "student":
            raise ValueError("tokens.policy soft_or compares the student with the stage's targets; source is student")
        if self.policy == "entropy_band":
            if self.low is None and self.high is None:
                raise ValueError("tokens.policy entropy_band needs tokens.low or tokens.high")
            if self.source == "student" and self.applies_to == "all":
                raise ValueError(
                    "entropy_band of the student with applies_to all would make the step's weight unknown before the "
                    "forward pass; use applies_to: kd, a store as source, or top_entropy with a share"
                )
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
    alpha: Scalar | None = Field(default=None, description="Overrides objective.alpha")
    ce_weight: Scalar | None = Field(default=None, description="Overrides objective.ce_weight")
    temperature: Scalar | None = Field(default=None, description="Overrides objective.temperature")
    temperature_side: TemperatureSide | None = Field(default=None, description="Overrides objective.temperature_side")
    divergence: Divergence | None = Field(default=None, description="Overrides objective.divergence")
    missing_mass: MissingMass | None = Field(default=None, description="Overrides objective.missing_mass")
    z_loss: Scalar | None = Field(default=None, description="Overrides objective.z_loss")
    options: dict[str, float] | None = Field(default=None, description="Overrides objective.options")
    rows: RowSelector | None = Field(default=None, description="Which rows; null takes all")
    tokens: TokenSelector | None = Field(default=None, description="Which token positions; null takes all")

    @model_validator(mode="after")
    def _bounds(self) -> Stage:
        _check_objective(self)
        if self.targets is None and self.tokens is not None:
            if self.tokens.policy == "soft_or":
                raise ValueError("tokens.policy soft_or needs the stage's targets")
            if self.tokens.applies_to == "kd":
                raise ValueError("tokens.applies_to kd has no effect in a stage without targets; remove the selector")
        return self
