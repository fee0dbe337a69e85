"""Settings of the answers that a student writes after the prompts of held-out rows."""

from __future__ import annotations

from pydantic import Field, model_validator

from potstill.common.config import StrictModel
from potstill.common.grading import GraderConfig


class AnswersConfig(StrictModel):
    """Answers that the student writes after held-out prompts, beside the share that it has right (answer_accuracy)."""

    generate: bool = Field(
        default=False,
        description="Have the answer of each held-out document with a mask written greedily, and compared with the "
        "document's own: answer_exact, and answer_grade and answer_pass_rate with a grader other than exact",
    )
    max_rows: int | None = Field(default=None, ge=1, description="Held-out rows whose answers are written; null: all")
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens of a graded answer at most; null: those of the longest reference (exact: of its own)",
    )
    grader: GraderConfig = Field(default_factory=GraderConfig, description="How written answers are graded")

    @property
    def has_grader(self) -> bool:
        """Whether answers are graded as texts; the exact match compares tokens."""
        return self.generate and self.grader.kind != "exact"

    @model_validator(mode="after")
    def _limit(self) -> AnswersConfig:
        if self.max_tokens is not None and not self.has_grader:
            raise ValueError(
                "max_tokens is for answers that are generated and graded by another grader than exact, which compares "
                "as many tokens as the reference has; remove it"
            )
        return self
