"""Weights of rows and documents: how a figure of theirs becomes a weight. A new form is a function and an entry.

The configuration reads this table, so nothing heavy is imported with it. data/weights.py takes the figures from the
stores; the division by their mean over the global batch is run/step_watch.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from potstill.common.config import StrictModel
from potstill.common.named_entries import NameIn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Float64 = NDArray[np.float64]


def _identity(value: Float64, a: float, b: float) -> Float64:
    """The figure itself."""
    return value


def _power(value: Float64, a: float, b: float) -> Float64:
    """value^a: above 1 a sharper, below 1 a flatter weight; 0 is uniform."""
    return value**a


def _exponential(value: Float64, a: float, b: float) -> Float64:
    """exp(a value): a < 0 weighs down what has a large loss, with a = -1 by its probability per token."""
    import numpy as np

    return np.exp(a * value)


def _beta(value: Float64, a: float, b: float) -> Float64:
    """p^a (1 - p)^b of a probability p (PACED, arXiv 2603.11178, with a = b = 1 its default of a pass rate)."""
    return value**a * (1.0 - value) ** b


def _band(value: Float64, a: float, b: float) -> Float64:
    """1 from a to b, else 0: a hard filter (PACED's baseline, of problems that are solved sometimes)."""
    import numpy as np

    return np.asarray((value >= a) & (value <= b), np.float64)


@dataclass(frozen=True)
class WeightForm:
    """A form. weight(values [n] float64, a, b) -> weights [n]; low, high: between which values it is defined."""

    weight: Callable[[Float64, float, float], Float64]
    low: float = 0.0
    high: float = math.inf


WEIGHT_FORMS: dict[str, WeightForm] = {
    "identity": WeightForm(_identity),
    "power": WeightForm(_power),
    "exponential": WeightForm(_exponential, low=-math.inf),
    "beta": WeightForm(_beta, high=1.0),
    "band": WeightForm(_band, low=-math.inf),
}

PROBABILITY = "probability"  # of a row: exp(-mean_loss)
LARGEST_NATS = 256.0  # stores keep losses and entropies below it


def _mean(total: Float64, count: Float64) -> Float64:
    """The mean over the trained positions."""
    return total / count


def _mean_probability(total: Float64, count: Float64) -> Float64:
    """exp(-mean loss): the geometric mean of the labels' probabilities."""
    import numpy as np

    return np.exp(-(total / count))


def _exact(total: Float64, count: Float64) -> Float64:
    """1 where all labels are the most probable token: greedy decoding would write just these (exact match)."""
    import numpy as np

    return np.asarray(total == count, np.float64)


def _answer_probability(total: Float64, count: Float64) -> Float64:
    """exp(-summed loss): the chance that sampling writes just these tokens, which is the pass rate of exact match."""
    import numpy as np

    return np.exp(-total)


@dataclass(frozen=True)
class DocumentColumn:
    """A figure of documents.

    of: the column of the labels that it is made of, by fold(sum [d], trained positions [d]) -> [d] over the documents
    that have such positions; of rank the labels of rank 0 are counted. None: the store keeps the figure itself, one per
    document. largest: that it may be.
    """

    of: Literal["loss", "rank", "entropy"] | None
    fold: Callable[[Float64, Float64], Float64] = _mean
    largest: float = 1.0


DOCUMENT_COLUMNS: dict[str, DocumentColumn] = {
    "loss": DocumentColumn("loss", largest=LARGEST_NATS),
    "accuracy": DocumentColumn("rank"),
    "probability": DocumentColumn("loss", _mean_probability),
    "entropy": DocumentColumn("entropy", largest=LARGEST_NATS),
    "exact": DocumentColumn("rank", _exact),
    "answer_probability": DocumentColumn("loss", _answer_probability),
    "pass_rate": DocumentColumn(None),
    "greedy_score": DocumentColumn(None),
}


class Weights(StrictModel):
    """What a row or a document counts, from a figure of a store; divided by the mean over the global batch."""

    of: Literal["row", "document"] = Field(
        description="row: by a statistic of the store's index; document: by a mean over its trained positions"
    )
    store: str = Field(description="Name in data.scores or data.targets")
    column: str = Field(
        description="row: name of the statistic (mean_loss, ...); document: loss, entropy, accuracy (share of labels "
        "of rank 0), exact (1 if all are), answer_probability (exp of minus the summed loss), pass_rate, greedy_score; "
        "both: probability, exp(-mean loss)"
    )
    form: Annotated[str, NameIn(WEIGHT_FORMS)] = Field(
        default="identity",
        description="identity: x; power: x^a; exponential: exp(a x); beta: x^a (1-x)^b; band: 1 if a <= x <= b",
    )
    a: float = Field(default=1.0, allow_inf_nan=False, description="a of the form")
    b: float = Field(default=1.0, allow_inf_nan=False, description="b of the form")
    applies_to: Literal["all", "kd"] = Field(
        default="all", description="all: the whole loss of its positions; kd: only their KD term"
    )
    mean_over: Literal["positions", "units"] = Field(
        default="positions",
        description="The mean over the global batch that divides them: of the trained positions, each with the weight "
        "of its row or document; units: of the rows or documents, each counting once, whatever its length",
    )

    def weigh(self, values: Float64) -> Float64:
        """Weights [n] of these figures [n], 0 below MIN_WEIGHT.

        Raises ValueError naming the first that is not a finite number >= 0.
        """
        import numpy as np

        entry = WEIGHT_FORMS[self.form]
        inside = (values >= entry.low) & (values <= entry.high) & np.isfinite(values)
        if not inside.all():
            place = int(np.flatnonzero(~inside)[0])
            raise ValueError(
                f"is {values[place]:.6g} at number {place}; form {self.form} takes finite numbers in "
                f"[{entry.low:g}, {entry.high:g}]"
            )
        with np.errstate(all="ignore"):
            weights = np.asarray(entry.weight(values, self.a, self.b), np.float64)
        bad = ~(np.isfinite(weights) & (weights >= 0) & (weights <= MAX_WEIGHT))
        if bad.any():
            place = int(np.flatnonzero(bad)[0])
            raise ValueError(
                f"is {values[place]:.6g} at number {place}, of which form {self.form} with a {self.a:g}, b {self.b:g} "
                f"makes the weight {weights[place]:.6g}; expected a number in [0, {MAX_WEIGHT:g}]"
            )
        return np.where(weights < MIN_WEIGHT, 0.0, weights)

    def describe(self) -> str:
        """In words, for a person."""
        form = f"{self.form} (a {self.a:g}, b {self.b:g})"
        of = "the whole loss" if self.applies_to == "all" else "KD alone"
        mean = "" if self.mean_over == "positions" else f", mean 1 over the {self.of}s of a batch"
        return f"{self.of}s weighted by {form} of their {self.column} in {self.store}, for {of}{mean}"

    @model_validator(mode="after")
    def _check(self) -> Weights:
        if self.of == "document" and self.column not in DOCUMENT_COLUMNS:
            raise ValueError(
                f"weights.column is {self.column!r}; of a document there are {', '.join(sorted(DOCUMENT_COLUMNS))}"
            )
        if self.form == "band" and self.a >= self.b:
            raise ValueError(f"weights.form band with a {self.a:g}, b {self.b:g}; expected a below b")
        if self.form == "beta" and (self.a < 0 or self.b < 0):
            raise ValueError(f"weights.form beta with a {self.a:g}, b {self.b:g}; expected both >= 0")
        if self.of == "document":
            self.check_bounds(DOCUMENT_COLUMNS[self.column].largest)
        return self

    def check_bounds(self, largest: float) -> None:
        """Refuse a form that a figure in [0, largest] may lie outside of, or take beyond MAX_WEIGHT.

        Such figures turn up in the middle of a run: of documents, and of rows that the run scores itself. Raises
        ValueError.
        """
        high = WEIGHT_FORMS[self.form].high
        if largest > high:
            raise ValueError(
                f"weights.form {self.form} takes numbers in [0, {high:g}], but the {self.column} of a {self.of} may be "
                f"up to {largest:g} nats; use column probability or accuracy, or another form"
            )
        # Statistics of rows are weighed before the run starts; of these nothing may turn up in the middle of it.
        if self.form == "power" and self.a < 0:
            raise ValueError(f"weights.form power of {self.of}s with a {self.a:g}; expected >= 0: a figure may be 0")
        if self.form == "power" and self.a * math.log(largest) > math.log(MAX_WEIGHT):
            raise ValueError(
                f"weights.form power of {self.of}s with a {self.a:g}: {self.column} may be up to {largest:g} nats, and "
                f"weights at most {MAX_WEIGHT:g}; use a <= {math.log(MAX_WEIGHT, largest):.3g}, or column probability"
            )
        if self.form == "exponential" and self.a > 0:
            raise ValueError(
                f"weights.form exponential of {self.of}s with a {self.a:g}; expected <= 0: a loss is unbounded"
            )


# Squares of weights are summed in float32 (the effective number of positions).
MAX_WEIGHT = 1e9
# Its products with what selectors leave of a position are not 0 in float32: positions are counted before and after.
MIN_WEIGHT = 1e-30
