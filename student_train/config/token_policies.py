"""Token policies: which positions of a row count, and how much. A new policy is a function and an entry.

A function makes a score of columns over the N positions of a micro-batch, with methods of tensors alone: the
configuration reads this table, so torch is not imported with it. An entry says all that is particular to a policy;
curriculum/token_selector.py turns scores into weights, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from potstill.common.config import StrictModel
from potstill.common.named_entries import NameIn
from potstill.student_train.config.curves import Scalar, check_bounds

if TYPE_CHECKING:
    from torch import Tensor

# Each [N]. loss, rank, entropy: figures of the source, a store or the student (no rank). reference_loss: of the
# reference. divergence: between the student and the stage's targets. key: a hash of the position, of no source.
Columns = Mapping[str, "Tensor"]


def _label_rank(columns: Columns, *, max_rank: int) -> Tensor:
    """1 where the small model has the true token among its first `max_rank` (SALT's learnable tokens, 2410.18779)."""
    return (columns["rank"] < max_rank).float()


def _top_loss(columns: Columns) -> Tensor:
    """The loss itself: hard positions first."""
    return columns["loss"]


def _top_entropy(columns: Columns) -> Tensor:
    """The entropy itself (SE-KD, 2602.01395, with the student as source)."""
    return columns["entropy"]


def _excess_loss(columns: Columns) -> Tensor:
    """Loss minus the reference's loss: still to learn, and learnable (Rho-1, 2404.07965)."""
    return columns["loss"] - columns["reference_loss"]


def _band(values: Tensor, low: float | None, high: float | None) -> Tensor:
    """1 where low <= value <= high; None leaves that side open."""
    low = -math.inf if low is None else low
    high = math.inf if high is None else high
    return ((values >= low) & (values <= high)).float()


def _entropy_band(columns: Columns, *, low: float | None, high: float | None) -> Tensor:
    """1 where low <= entropy <= high, in nats."""
    return _band(columns["entropy"], low, high)


def _excess_band(columns: Columns, *, low: float | None, high: float | None) -> Tensor:
    """1 where low <= excess loss <= high, in nats: unlike a share, a bound moves positions from row to row."""
    return _band(_excess_loss(columns), low, high)


def _paced(columns: Columns, *, power_a: float, power_b: float) -> Tensor:
    """p^a (1-p)^b of the true token's probability p: our own, after PACED (2603.11178), whose p is of a problem.

    Scaled to mean 1 in each row it compares the tokens of a row; to compare problems, as the paper does: `weights`.
    """
    p = (-columns["loss"]).exp().clamp(0.0, 1.0)
    return p**power_a * (1.0 - p) ** power_b


def _soft_or(columns: Columns) -> Tensor:
    """1 - (1 - h)(1 - d) of student entropy h and divergence d, each over its row's largest (TIP, 2604.14084)."""
    return 1.0 - (1.0 - columns["entropy"]) * (1.0 - columns["divergence"])


def _random(columns: Columns) -> Tensor:
    """A keyed hash of the position: the control that an informed policy must beat."""
    return columns["key"]


def _needs_store(selector: TokenSelector) -> str | None:
    if selector.source != "student":
        return None
    return f"tokens.policy {selector.policy} needs tokens.source: a scores or targets store"


def _needs_reference(selector: TokenSelector) -> str | None:
    if selector.reference is not None:
        return None
    return f"tokens.policy {selector.policy} needs tokens.reference, the store whose loss is taken off"


def _needs_student(selector: TokenSelector) -> str | None:
    if selector.source == "student":
        return None
    return f"tokens.policy {selector.policy} compares the student with the stage's targets; source is student"


def _needs_a_bound(selector: TokenSelector) -> str | None:
    if selector.low is not None or selector.high is not None:
        return None
    return f"tokens.policy {selector.policy} needs tokens.low or tokens.high"


def _needs_reference_and_bound(selector: TokenSelector) -> str | None:
    return _needs_reference(selector) or _needs_a_bound(selector)


@dataclass(frozen=True, kw_only=True)
class TokenPolicy:
    """All that is particular to a policy.

    kind:    `share`: the best-scored share of each row counts 1; `mask`: score 1 counts 1; `weight`: soft, row mean 1
    needs:   names of the columns that it looks at
    score:   columns and the keys it reads -> score [N]
    reads:   keys of the selector that `score` takes by their names
    check:   what is wrong with a selector of this policy, or None
    by_row_maximum: whether each column is divided by the largest of its labelled values in the row, to lie in [0, 1]
    """

    kind: Literal["share", "mask", "weight"]
    needs: tuple[str, ...]
    score: Callable[..., Tensor]
    reads: tuple[str, ...] = ()
    check: Callable[[TokenSelector], str | None] = lambda selector: None
    by_row_maximum: bool = False

    @property
    def needs_targets(self) -> bool:
        """Whether the stage's targets are read even where their loss weighs nothing."""
        return "divergence" in self.needs

    @property
    def needs_source(self) -> bool:
        """Whether figures of the source are looked at."""
        return set(self.needs) != {"key"}


TOKEN_POLICIES: dict[str, TokenPolicy] = {
    "label_rank": TokenPolicy(kind="mask", needs=("rank",), score=_label_rank, reads=("max_rank",), check=_needs_store),
    "top_loss": TokenPolicy(kind="share", needs=("loss",), score=_top_loss),
    "top_entropy": TokenPolicy(kind="share", needs=("entropy",), score=_top_entropy),
    "excess_loss": TokenPolicy(
        kind="share", needs=("loss", "reference_loss"), score=_excess_loss, check=_needs_reference
    ),
    "excess_band": TokenPolicy(
        kind="mask",
        needs=("loss", "reference_loss"),
        score=_excess_band,
        reads=("low", "high"),
        check=_needs_reference_and_bound,
    ),
    "entropy_band": TokenPolicy(
        kind="mask", needs=("entropy",), score=_entropy_band, reads=("low", "high"), check=_needs_a_bound
    ),
    "skip_low_entropy": TokenPolicy(kind="share", needs=("entropy",), score=_top_entropy),
    "paced": TokenPolicy(kind="weight", needs=("loss",), score=_paced, reads=("power_a", "power_b")),
    "soft_or": TokenPolicy(
        kind="share", needs=("entropy", "divergence"), score=_soft_or, check=_needs_student, by_row_maximum=True
    ),
    "random": TokenPolicy(kind="share", needs=("key",), score=_random),
}


class TokenSelector(StrictModel):
    """Which token positions a stage trains on, or how much each counts."""

    policy: Annotated[str, NameIn(TOKEN_POLICIES)] = Field(
        description="See config/token_policies.py: one table of policies"
    )
    source: str = Field(
        default="student", description="Whose figures: a store of data.scores or data.targets, or student"
    )
    reference: str | None = Field(default=None, description="excess_loss, excess_band: store whose loss is taken off")
    share: Scalar = Field(default=1.0, description="Share of each row's labelled positions that is kept, in (0, 1]")
    floor: Scalar = Field(
        default=0.0, description="Weight of the positions that were not chosen, in [0, 1]; 1 is uniform"
    )
    max_rank: int = Field(
        default=10, ge=1, le=255, description="label_rank: keep while the true token is among the first so many"
    )
    low: float | None = Field(default=None, ge=0, description="entropy_band, excess_band: lowest value kept, nats")
    high: float | None = Field(default=None, ge=0, description="entropy_band, excess_band: highest value kept, nats")
    power_a: float = Field(default=1.0, ge=0, description="paced: a of p^a (1-p)^b")
    power_b: float = Field(default=1.0, ge=0, description="paced: b of p^a (1-p)^b")
    applies_to: Literal["all", "kd"] = Field(
        default="all", description="all: the position leaves the loss; kd: only its KD term"
    )

    @property
    def entry(self) -> TokenPolicy:
        """The policy's entry in the table."""
        return TOKEN_POLICIES[self.policy]

    @property
    def uses_student(self) -> bool:
        """Whether the choice can only be made inside the forward pass."""
        return self.source == "student" and self.entry.needs_source

    def score(self, columns: Columns) -> Tensor:
        """The policy's score [N] of these columns."""
        return self.entry.score(columns, **{name: getattr(self, name) for name in self.entry.reads})

    def stores(self) -> frozenset[str]:
        """Names of the stores whose columns the policy needs."""
        return frozenset({self.source, self.reference or "student"} - {"student"}) - (
            frozenset() if self.entry.needs_source else {self.source}
        )

    @model_validator(mode="after")
    def _check(self) -> TokenSelector:
        check_bounds("tokens.share", self.share, low=0.0, high=1.0, open_low=True)
        check_bounds("tokens.floor", self.floor, low=0.0, high=1.0)
        wrong = self.entry.check(self)
        if wrong is not None:
            raise ValueError(wrong)
        if self.entry.kind == "mask" and self.uses_student and self.applies_to == "all":
            raise ValueError(
                f"{self.policy} of the student with applies_to all would make the step's weight unknown before the "
                "forward pass; use applies_to: kd, a store as source, or top_entropy with a share"
            )
        return self
