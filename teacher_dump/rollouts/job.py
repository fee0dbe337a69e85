"""The work of `rollout` on a batch of rows: score them, ask for answers, grade these, and keep what is wanted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from potstill.common.errors import UserError
from potstill.storage import RunSpec, StoreReader, StoreWriter, discard_store
from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.engines.base import TeacherEngine
from potstill.teacher_dump.engines.hf import HfEngine
from potstill.teacher_dump.rollouts.config import RolloutConfig
from potstill.teacher_dump.rollouts.generation import Asked, Sampling, can_pad, continue_prompts
from potstill.teacher_dump.rollouts.questions import Survey, questions_of
from potstill.teacher_dump.rollouts.result import RolloutResult
from potstill.teacher_dump.rollouts.texts import Judge
from potstill.teacher_dump.row_scores import SCORE_STATS
from potstill.teacher_dump.scoring import ScoreJob

MASK_COLUMN = "mask"
_MOST_TOKENS = 1 << 24  # of a row of a store


@dataclass(frozen=True)
class RolloutJob(ScoreJob):
    """See Job. `answers`: where the answers of each row go, and `tokens` where these are packed at the end; `ran`: what
    is known once the model is loaded."""

    mixes: ClassVar[bool] = False  # answers are drawn, and another engine would draw others
    config: RolloutConfig
    judge: Judge
    survey: Survey
    answers: str
    tokens: str
    ran: dict[str, bool] = field(default_factory=dict)
    word = "rollout"

    @property
    def max_new_tokens(self) -> int:
        """Tokens of an answer at most."""
        return self.config.max_new_tokens or self.survey.longest

    def described(self) -> dict[str, Any]:
        """What decides the answers and their grades, for run.json."""
        config = self.config
        return {
            "samples": config.samples,
            "greedy": config.greedy,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": config.seed,
            "max_new_tokens": self.max_new_tokens,
            "stop_ids": sorted(self.judge.stop_ids),
            "grader": {key: value for key, value in config.grader.model_dump().items() if value is not None},
            "passing": config.grader.passing,
            "graded_as": "ids" if config.grade_ids else "text",
        }

    def spec(self, tokens: StoreReader, teacher: dict[str, object]) -> RunSpec:
        plain = super().spec(tokens, teacher)
        stats = tuple(f"mean_{name}" for name in self.config.columns)
        return replace(
            plain,
            stats=(*SCORE_STATS, *stats),
            columns=self.config.columns,
            info={**plain.info, "rollout": self.described()},
        )

    def beside(self, tokens: StoreReader) -> StoreWriter | None:
        nothing_kept = self.config.keep == "none"
        if self.config.force:
            # Now, not when the new ones are packed: those of another model must not stand beside new figures.
            discard_store(self.tokens, kind="tokens", writer="rollout")
            if nothing_kept:
                discard_store(self.answers, kind="tokens", writer="rollout")
        if nothing_kept:
            return None
        spec = tokens.spec
        most = len(self.config.numbers) * (spec.row_length + self.survey.row_documents * self.max_new_tokens)
        if most > _MOST_TOKENS:
            raise UserError(
                f"the answers to one row of {self.config.tokens} may have {most} tokens together, a row holds "
                f"{_MOST_TOKENS}; ask for fewer samples, a smaller max_new_tokens, or set keep to none"
            )
        answers = RunSpec(
            kind="tokens",
            row_length=most,
            rows_per_unit=spec.rows_per_unit,
            num_rows=tokens.num_rows,
            vocab_size=spec.vocab_size,
            tokenizer_digest=spec.tokenizer_digest,
            columns=(MASK_COLUMN,),
            info={"part": "answers", "of": tokens.digest, "keep": self.config.keep, "rollout": self.described()},
        )
        return StoreWriter.create(self.answers, answers, force=self.config.force)

    def compute(self, engine: TeacherEngine, batch: TeacherBatch, vocab_size: int) -> RolloutResult:
        assert isinstance(engine, HfEngine), "the configuration refuses other engines"
        # The walk of answers waits for the device at each token, so it costs nothing to wait for the scores here.
        scored = super().compute(engine, batch, vocab_size).rows()
        if "padded" not in self.ran:
            self.ran["padded"] = can_pad(engine.model, vocab_size=vocab_size, row_length=self.survey.row_length)
        config, store = self.config, self.config.tokens
        # Of a row of which the model says nothing finite it is asked nothing.
        questions = [
            questions_of(row, self.judge.stop_ids, store=store) if refused is None else [None] * len(row.doc_lens)
            for row, (_, refused) in zip(batch.rows, scored.rows, strict=True)
        ]
        asked = [
            Asked(one.prompt, one.unit, number, one.limit(self.max_new_tokens, self.survey.row_length))
            for of_row in questions
            for one in of_row
            if one is not None
            for number in config.numbers
        ]
        found = continue_prompts(
            engine.model,
            asked,
            sampling=Sampling(
                vocab_size=vocab_size, temperature=config.temperature, top_p=config.top_p, seed=config.seed
            ),
            stop_ids=self.judge.stop_ids,
            batch=config.batch_answers,
            padded=self.ran["padded"],
        )
        return RolloutResult(config, scored, batch.rows, self.judge, questions, found)
