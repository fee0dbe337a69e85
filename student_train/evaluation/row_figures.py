"""Single rows as training sees them: whether a step may draw a row, what each token counts, and the student's loss.

All of it by the functions that training uses: `open_stores`, `build_plan`, `collate`, and the student's own head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.common.errors import UserError
from potstill.kernels.types import IGNORE_LABEL
from potstill.storage import LoadedBatch, SourceRows, StoreReader, TokensRow
from potstill.student_train.config.lr_schedule import span_steps
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.curriculum.live_scores import LiveScores
from potstill.student_train.curriculum.plan import CurriculumPlan
from potstill.student_train.curriculum.step_objective import StepObjective
from potstill.student_train.data.batch import JoinedRow, MicroBatch, collate
from potstill.student_train.data.stores import Stores, build_plan, check_objectives, open_stores
from potstill.student_train.evaluation.heldout import measuring_objective
from potstill.student_train.hf_export.weights import Source, load_model
from potstill.student_train.model.student import StudentModel
from potstill.student_train.run.checkpoint import Checkpoint
from potstill.student_train.run.rescoring import saved_scores

Figures = NDArray[np.float32]


@dataclass(frozen=True)
class StudentFigures:
    """What a student says of the n positions of a row, in nats: loss of the next token (0 without one), entropy [n]."""

    loss: Figures
    entropy: Figures


@dataclass(frozen=True)
class KeptFigures:
    """What one step keeps of a row of n tokens. Position t is about token t + 1.

    in_pool: whether the step may draw the row. token_weights [n]: weight in the whole loss; kd_weights [n]: in its
    distillation term (0 where no target is stored), None where the step has none. Both 0 without a next token in the
    document. Of a row outside the pool the weights are those that it would have. The stage's weights of rows and
    documents are in them as they stand, not divided by their mean over a global batch. labelled bool [n].
    """

    in_pool: bool
    token_weights: Figures
    kd_weights: Figures | None
    labelled: NDArray[np.bool_]


@dataclass(frozen=True)
class RowFigures:
    """Both for one row; None for what was not asked for."""

    row: int
    kept: KeptFigures | None
    student: StudentFigures | None


@dataclass(frozen=True)
class CurriculumStep:
    """One optimizer step of a plan with the stores that it reads, for rows of one source (its number)."""

    stores: Stores
    plan: CurriculumPlan
    step: int
    source: int = 0

    @property
    def objective(self) -> StepObjective:
        """Loss settings of the step."""
        return self.plan.objective(self.step)

    @property
    def needs_student(self) -> bool:
        """Whether the tokens can only be chosen by the student's own figures."""
        tokens = self.objective.tokens
        return tokens is not None and tokens.uses_student

    @property
    def pool_size(self) -> int:
        """Rows that the step may draw."""
        return self.plan.segment(self.step).pool_size

    def has_in_pool(self, row: int) -> bool:
        """Whether the step may draw this row of the source."""
        return self.plan.segment(self.step).has_in_pool(self._global(row))

    def micro_batch(self, row: int) -> MicroBatch:
        """The row of the source alone, as training collates it at this step."""
        rows = SourceRows(self.stores.sources)
        tokens, joined = rows.read(np.array([self._global(row)], np.int64), self.plan.joined(self.step))
        return _collated(
            tokens[0],
            joined,
            self.objective,
            row_length=self.stores.spec.row_length,
            step=self.step,
            live=self.plan.live,
        )

    def _global(self, row: int) -> int:
        return row + sum(source.tokens.num_rows for source in self.stores.sources[: self.source])


def curriculum_step(
    config: TrainConfig,
    tokens: StoreReader,
    *,
    step: int | float | None,
    default: int,
    checkpoints: Sequence[Checkpoint] = (),
) -> CurriculumStep:
    """Open the stores of a configuration and stand at a step: a number, a share of the run (float), or `default`.

    `checkpoints` of the run hold what it has scored itself (rescoring). Raises UserError (also StoreError) where the
    stores do not fit, are not over `tokens`, the run has no such step, or no checkpoint holds the scores of the step.
    """
    stores = open_stores(config)
    source = _source_number(config, stores, tokens)
    check_objectives(config, stores)
    plan = build_plan(config, stores)
    last = plan.total_steps - 1
    if step is None:
        found = min(default, last)
    elif isinstance(step, int):
        found = step
    else:
        found = min(span_steps(step, plan.total_steps), last) if 0 <= step <= 1 else -1
    if not 0 <= found <= last:
        raise UserError(
            f"step {step}: the run has the steps 0 to {last}; name one of them, or a share of the run such as 0.5"
        )
    return CurriculumStep(stores, _with_scores(config, plan, found, checkpoints), found, source)


def _with_scores(
    config: TrainConfig, plan: CurriculumPlan, step: int, checkpoints: Sequence[Checkpoint]
) -> CurriculumPlan:
    """The plan with the scores that the run made itself before `step`, where its stage reads them."""
    if config.rescoring is None or not config.rescoring.is_read_by(plan.segment(step).span.stage):
        return plan
    scores = saved_scores(config, checkpoints, step)
    if scores is None:
        steps = ", ".join(str(checkpoint.step) for checkpoint in checkpoints) or "none"
        raise UserError(
            f"step {step} reads {config.rescoring.name!r}, scores that the run makes itself each "
            f"{config.rescoring.every_steps} steps, and no checkpoint holds those of this step (there are: {steps}); "
            "name a step near one of them"
        )
    return plan.with_scores(scores)


def _source_number(config: TrainConfig, stores: Stores, tokens: StoreReader) -> int:
    """Number of the source that holds the rows of `tokens`; the first one where several do. Raises UserError."""
    for number, source in enumerate(stores.sources):
        if source.tokens.digest == tokens.digest:
            return number
    places = ", ".join(
        f"{named.key}.tokens = {named.config.tokens} has the digest {source.tokens.digest[:16]}"
        for named, source in zip(config.data.named_sources(), stores.sources, strict=True)
    )
    raise UserError(
        f"the run trains on other tokens: {places}, {tokens.url} has {tokens.digest[:16]}; show rows of a store that "
        "it trains on"
    )


def load_student(source: Source, tokens: StoreReader) -> StudentModel:
    """The student of a run, a checkpoint or a Hugging Face folder, in float32. Raises UserError."""
    hf = load_model(source, dtype="float32")
    vocab_size = hf.config.get_text_config().vocab_size
    if vocab_size < tokens.vocab_size:
        raise UserError(
            f"{source.folder} has vocab_size {vocab_size}, the rows of {tokens.url} ids below {tokens.vocab_size}; "
            "they were not made with the same tokenizer"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return StudentModel(hf).to(device).eval()


def row_figures(
    rows: Sequence[int], tokens: StoreReader, *, at: CurriculumStep | None, student: StudentModel | None
) -> list[RowFigures]:
    """Figures of each row at a step, and by a student; one of the two may be None.

    Raises UserError when the step chooses tokens by the student's own figures and there is no student.
    """
    if at is not None and at.needs_student and student is None:
        tokens_of = at.objective.tokens
        assert tokens_of is not None
        raise UserError(
            f"step {at.step} (stage {at.plan.segment(at.step).span.name}) chooses tokens by the student's own figures "
            f"(policy {tokens_of.selector.policy}), and no student is given; name a run or a model folder"
        )
    return [_figures_of(row, tokens, at, student) for row in rows]


@torch.no_grad()
def _figures_of(row: int, tokens: StoreReader, at: CurriculumStep | None, student: StudentModel | None) -> RowFigures:
    objective = measuring_objective(with_targets=False) if at is None else at.objective
    if at is None:
        found = tokens.tokens_rows([row])[0]
        micro = _collated(found, {}, objective, row_length=tokens.spec.row_length, step=0)
    else:
        micro = at.micro_batch(row)
    labelled = micro.labels != IGNORE_LABEL
    said, hidden = None, None
    if student is not None:
        micro = micro.to(next(student.parameters()).device)
        hidden = student.hidden_states(micro)
        figures = student.hf.lm_head.statistics(hidden, micro, None)
        said = StudentFigures(_array(-figures.label_logprob), _array(figures.entropy))
    if at is None:
        return RowFigures(row, None, said)
    weights, kd_weights = _weights(micro, objective, hidden, student)
    kept = KeptFigures(
        in_pool=at.has_in_pool(row),
        token_weights=_array(weights),
        kd_weights=_kd_weights(micro, objective, weights, kd_weights),
        labelled=labelled.numpy(),
    )
    return RowFigures(row, kept, said)


def _weights(
    micro: MicroBatch, objective: StepObjective, hidden: Tensor | None, student: StudentModel | None
) -> tuple[Tensor, Tensor | None]:
    """Weights [N] for the whole loss and for its KD term, as the head has them."""
    if student is not None:
        found: tuple[Tensor, Tensor | None] = student.hf.lm_head.choice(hidden, micro, objective)
        return found
    everywhere = (micro.labels != IGNORE_LABEL).float()
    return (everywhere if micro.token_weights is None else micro.token_weights), micro.kd_weights


def _kd_weights(
    micro: MicroBatch, objective: StepObjective, weights: Tensor, kd_weights: Tensor | None
) -> Figures | None:
    if objective.settings.alpha == 0.0 or micro.targets is None:
        return None
    has_target = micro.targets.offsets.diff() > 0  # [N]
    return _array((weights if kd_weights is None else weights * kd_weights) * has_target)


def _array(values: Tensor) -> Figures:
    return cast(Figures, values.float().cpu().numpy())


def _collated(
    row: TokensRow,
    joined: Mapping[str, Sequence[JoinedRow | None]],
    objective: StepObjective,
    *,
    row_length: int,
    step: int,
    live: LiveScores | None = None,
) -> MicroBatch:
    batch = LoadedBatch(batch=step, rows=np.array([row.row], np.int64), tokens=[row], joined=joined)
    return collate(batch, objective, micro_batch_rows=1, row_length=row_length, live=live)[0]
