"""Configuration of rescoring: rows and documents scored again and again by the student that is being trained.

Stages name the scores as they name a store of scores. What is checked here needs values alone; that row selectors rank
at the right steps is seen with the plan (curriculum/segments.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from potstill.common.config import StrictModel
from potstill.common.grading import GraderConfig
from potstill.student_train.config.weights import DOCUMENT_COLUMNS, LARGEST_NATS, PROBABILITY, Weights

if TYPE_CHECKING:
    from potstill.student_train.config.stages import Stage

# Statistics of a row, and what each may be at most: means over its trained positions, and over its documents.
ROW_STATISTICS = {
    "mean_loss": LARGEST_NATS,
    "mean_entropy": LARGEST_NATS,
    "accuracy": 1.0,
    "num_targets": float(2**31),
    "mean_exact": 1.0,
    "mean_answer_probability": 1.0,
}
PASS_RATE = "pass_rate"  # of documents; of rows `mean_pass_rate`


class GeneratedAnswers(StrictModel):
    """Answers that the student writes to each document's prompt: what stands before its first trained token."""

    per_prompt: int = Field(default=8, ge=1, le=1024, description="Answers per document, K of the pass rate")
    temperature: float = Field(default=1.0, gt=0, le=10, description="Temperature of the draws")
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="Tokens of an answer at most; null: as many as the document's own answer has"
    )
    grader: GraderConfig = Field(
        default_factory=GraderConfig, description="How an answer is graded against the document's own"
    )


class Rescoring(StrictModel):
    """Scores of the current student, made where stages begin to read them and again each so many steps."""

    every_steps: int = Field(ge=1, description="Score where stages begin to read, then before each multiple of this")
    name: str = Field(default="current", min_length=1, description="Name by which stages read the scores")
    rows: Literal["upcoming", "all"] = Field(
        default="upcoming",
        description="upcoming: the rows that the steps up to the next scoring weigh by the scores; all: every row, "
        "which a row selector needs that ranks by them",
    )
    measure: Literal["forced", "generated"] = Field(
        default="forced",
        description="forced: one forward over each row; generated: also answers of the student's own, for pass_rate",
    )
    batch_rows: int = Field(default=8, ge=1, description="Rows (of answers: documents x answers) per forward")
    generated: GeneratedAnswers = Field(
        default_factory=GeneratedAnswers, description="The answers of measure generated"
    )

    @property
    def document_columns(self) -> tuple[str, ...]:
        """What documents can be weighed by."""
        own = tuple(name for name, column in DOCUMENT_COLUMNS.items() if column.of is not None)
        return (*own, PASS_RATE) if self.measure == "generated" else own

    @property
    def row_statistics(self) -> dict[str, float]:
        """Statistics of rows, and what each may be at most."""
        return {**ROW_STATISTICS, f"mean_{PASS_RATE}": 1.0} if self.measure == "generated" else ROW_STATISTICS

    @model_validator(mode="after")
    def _generated(self) -> Rescoring:
        if self.measure == "forced" and self.generated != GeneratedAnswers():
            raise ValueError("rescoring.generated is for measure generated; set that, or remove the group")
        return self

    def check_stage(self, stage: Stage, *, key: str) -> None:
        """Refuse a stage that asks for what these scores do not have. Raises ValueError that names its key."""
        if stage.tokens is not None and self.name in stage.tokens.stores():
            raise ValueError(
                f"{key}.tokens names {self.name!r}, the scores of rescoring, which are of rows and documents; the "
                "student's own figures of each token are source: student, made in the forward pass of the step"
            )
        if stage.rows is not None and self.ranks(stage):
            self._check_statistics(stage, key)
        if stage.weights is not None and stage.weights.store == self.name:
            self._check_weights(stage.weights, key=f"{key}.weights")

    def ranks(self, stage: Stage) -> bool:
        """Whether the stage's row selector ranks rows by these scores."""
        return stage.rows is not None and any(ref.store == self.name for ref in stage.rows.score.of)

    def is_read_by(self, stage: Stage) -> bool:
        """Whether the stage reads these scores at all."""
        return self.ranks(stage) or (stage.weights is not None and stage.weights.store == self.name)

    def _check_statistics(self, stage: Stage, key: str) -> None:
        assert stage.rows is not None
        for reference in stage.rows.score.of:
            if reference.store == self.name and reference.stat not in self.row_statistics:
                raise ValueError(
                    f"{key}.rows.score: the scores of rescoring ({self.name!r}) have no row statistic "
                    f"{reference.stat!r}; they have {', '.join(self.row_statistics)}"
                )
        if self.rows == "upcoming":
            raise ValueError(
                f"{key}.rows ranks all rows by {self.name!r}, but rescoring.rows is upcoming: which rows come next is "
                "what the ranking says; set rescoring.rows: all, which scores every row each time"
            )

    def _check_weights(self, weights: Weights, *, key: str) -> None:
        known = self.document_columns if weights.of == "document" else (*self.row_statistics, PROBABILITY)
        if weights.column not in known:
            generated = (
                "" if weights.column not in (PASS_RATE, f"mean_{PASS_RATE}") else " (rescoring.measure: generated)"
            )
            raise ValueError(
                f"{key}.column: the scores of rescoring ({self.name!r}) have no {weights.column!r} of a {weights.of}"
                f"{generated}; they have {', '.join(known)}"
            )
        if weights.of == "row":
            weights.check_bounds(self.row_statistics.get(weights.column, 1.0))
