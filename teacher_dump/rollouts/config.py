"""Settings of `rollout`: those of `score`, and how answers are made, graded and kept."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from potstill.common.grading import GraderConfig
from potstill.teacher_dump.config import PlaceText, ScoreConfig

Keep = Literal["all", "passed", "failed", "first", "none"]


class RolloutConfig(ScoreConfig):
    """A model's own answers to the prompts of a tokens store -> OUTPUT/scores, OUTPUT/answers and OUTPUT/tokens."""

    output: PlaceText = Field(description="Folder (or URL) for the stores scores/, answers/ and tokens/")
    samples: int = Field(default=8, ge=0, le=1024, description="Sampled answers per prompt (K of a pass rate)")
    greedy: bool = Field(default=True, description="The greedy answer as well")
    temperature: float = Field(default=1.0, gt=0, le=100, description="Temperature of the samples")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Samples from the most probable ids of this mass only")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="Key of the draws, with document, sample and position")
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="Tokens of an answer at most; None: those of the longest reference of the store"
    )
    stop_ids: list[int] | None = Field(
        default=None, description="Ids that end an answer; None: the end marks of the store and of its tokenizer"
    )
    grader: GraderConfig = Field(default_factory=lambda: GraderConfig.model_validate({}))
    tokenizer: PlaceText | None = Field(
        default=None, description="Tokenizer folder of the rows; None: the one beside them, or that of the model"
    )
    grade_ids: bool = Field(
        default=False, description="Grade ids, written as numbers between spaces, and look for no tokenizer"
    )
    keep: Keep = Field(
        default="all", description="Answers for OUTPUT/tokens; first: the greedy one, or else sample 0, of each prompt"
    )
    batch_answers: int = Field(default=64, ge=1, description="Answers that are made at the same time")

    @model_validator(mode="after")
    def _answers(self) -> Self:
        if not self.samples and not self.greedy:
            raise ValueError("samples is 0 and greedy is false, so that there are no answers; ask for one of them")
        if self.model.engine != "hf" or self.model.ensemble or self.model.compile or self.model.tensor_parallel > 1:
            raise ValueError(
                "rollout runs one model with a cache in one process: use engine hf, no ensemble, no compile and no "
                "tensor_parallel"
            )
        if self.grade_ids and self.tokenizer is not None:
            raise ValueError("grade_ids reads no tokenizer; leave one of the two out")
        if self.stop_ids is not None and any(one < 0 for one in self.stop_ids):
            raise ValueError(f"stop_ids are {self.stop_ids}; expected ids, 0 or more")
        return self

    @property
    def numbers(self) -> tuple[int | None, ...]:
        """The answers to each prompt in order: None is the greedy one, a number a sample."""
        return (*((None,) if self.greedy else ()), *range(self.samples))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns per document that come of it."""
        return (*(("pass_rate",) if self.samples else ()), *(("greedy_score",) if self.greedy else ()))


def store_places(config: RolloutConfig) -> dict[str, str]:
    """Where each store goes, by name."""
    return {name: f"{config.output.rstrip('/')}/{name}" for name in ("scores", "answers", "tokens")}
