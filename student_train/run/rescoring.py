"""Rescoring: what is decided at its steps are scores of rows and documents by the student of that step."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill.common.errors import UserError
from potstill.storage import SourceRows
from potstill.student_train.config.rescoring import PASS_RATE, Rescoring
from potstill.student_train.config.stages import Stage
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.curriculum.live_scores import LiveScores
from potstill.student_train.curriculum.plan import CurriculumPlan
from potstill.student_train.data.stores import Stores
from potstill.student_train.evaluation.drawn_answers import AnswerDrawing
from potstill.student_train.evaluation.written_answers import AnswerWriting
from potstill.student_train.run.engine import Topology
from potstill.student_train.run.legs import DecisionPoint
from potstill.student_train.run.live_scoring import RowScorer

if TYPE_CHECKING:
    from potstill.student_train.run.checkpoint import Checkpoint
    from potstill.student_train.run.preflight import CheckedRun

log = logging.getLogger(__name__)
FILE = "rescoring.npz"  # in a checkpoint's folder
BINS = 10  # of the histograms of a line of metrics, over [0, 1]
Int64 = np.typing.NDArray[np.int64]


@dataclass
class RescoringDecider:
    """Scores rows where stages begin to read the scores, and before each multiple of `every_steps` while they do."""

    config: TrainConfig
    options: Rescoring
    stores: Stores
    writing: AnswerWriting | None
    spans: tuple[tuple[int, int, Stage], ...]  # first step, end and stage
    name: str = field(default="rescoring", init=False)
    scores: LiveScores | None = field(default=None, init=False)
    scored_until: int | None = field(default=None, init=False)  # the step that the scored rows reach to; None: all rows

    @property
    def decided_step(self) -> int | None:
        """The step before which it scored last."""
        return None if self.scores is None else self.scores.step

    @cached_property
    def _stretches(self) -> list[tuple[int, int]]:
        """First step and end of each run of stages that read the scores."""
        found: list[tuple[int, int]] = []
        for first, end, stage in self.spans:
            if not self.options.is_read_by(stage):
                continue
            if found and found[-1][1] == first:
                first = found.pop()[0]
            found.append((first, end))
        return found

    def next_step(self, step: int) -> int | None:
        """The first step from `step` on before which rows are scored; None where no stage reads them any more.

        That is where stages begin to read them (the student of before knew less), and each multiple of every_steps from
        there on; also where a run that was made longer comes to the end of the steps that its rows were scored for.
        """
        every = self.options.every_steps
        due = (first if step <= first else -(-step // every) * every for first, end in self._stretches if step < end)
        ends = (end for _, end in self._stretches if step < end)
        found = next((number for number, end in zip(due, ends, strict=True) if number < end), None)
        if self.scored_until is None or step > self.scored_until or not self._reading(self.scored_until):
            return found
        return self.scored_until if found is None else min(found, self.scored_until)

    def _reading(self, step: int) -> range:
        """The steps from `step` up to the next scoring, where a stage reads the scores at `step`; else none."""
        following = (step // self.options.every_steps + 1) * self.options.every_steps
        end = next((end for first, end in self._stretches if first <= step < end), step)
        return range(step, min(end, following))

    def decide(self, at: DecisionPoint) -> dict[str, Any]:
        """Score the rows; figures are means over documents and rows (a collective call)."""
        started = time.monotonic()
        run = at.run
        rows = self.rows_to_score(run.plan, at.step)
        is_first = self.scores is None
        self.scores = self._scorer(run.topology).score(run.engine, rows, step=at.step)
        self._check_weights(at.step, is_first=is_first)
        self._check_ties(run.plan, at.step, is_first=is_first, is_main=run.topology.is_main)
        self.scored_until = self._reading(at.step)[-1] + 1 if self.options.rows == "upcoming" else None
        seconds = time.monotonic() - started
        figures = figures_of(self.scores, self.options)
        if run.topology.is_main:
            log.info(
                "step %d/%d scored %s rows (%s documents) by the student in %.1f s: %s",
                *(
                    at.step,
                    run.plan.total_steps,
                    f"{len(rows):,}",
                    f"{figures['documents']:,}",
                    seconds,
                    means_told(figures),
                ),
            )
        return {**figures, "seconds": seconds}

    def _check_weights(self, step: int, *, is_first: bool) -> None:
        """Refuse a beginning from which nothing follows; later a student may have come to know all that is asked."""
        assert self.scores is not None
        steps = self._reading(step)
        for first, end, stage in self.spans:
            weights = stage.weights
            if weights is None or weights.store != self.options.name or first > steps[-1] or end <= steps[0]:
                continue
            values = self.scores.values(weights.of, weights.column)
            if weights.weigh(values).any():
                continue
            of_kd = weights.applies_to == "kd"
            lost = f"there is no KD up to step {steps[-1] + 1}" if of_kd else "there is nothing to train on"
            found = (
                f"rescoring before step {step}: all that was scored weighs 0, so {lost}: {weights.describe()}, "
                f"which is {values.max(initial=0.0):.4g} at most"
            )
            if is_first and not of_kd:
                raise UserError(
                    f"{found}; let a stage without weights come first, so that the student can do some of it, or take "
                    "another form, or a column that is never 0 (answer_probability)"
                )
            log.warning("%s", found)

    def _check_ties(self, plan: CurriculumPlan, step: int, *, is_first: bool, is_main: bool) -> None:
        """Refuse a beginning whose rows are ranked by their ids; later a student may come to tell fewer rows apart.

        A run that stopped there could not be continued: how it ranks is pinned.
        """
        ties = self.in_plan(plan).segment(step).ties
        if ties and is_first:
            raise UserError(f"rescoring before step {step}: {ties[0]}")
        if ties and is_main:
            log.warning("rescoring before step %d: row ids decide, %s", step, "; ".join(ties))

    def rows_to_score(self, plan: CurriculumPlan, step: int) -> Int64:
        """Ids over all sources, ascending, of the rows to score before `step`."""
        steps = self._reading(step)
        if self.options.rows == "upcoming":
            return np.unique(np.concatenate([plan.rows(number) for number in steps]))
        drawn = {name for number in steps for name in plan.mix(number)}
        bounds = np.cumsum([0, *(source.tokens.num_rows for source in self.stores.sources)])
        parts = [
            np.arange(bounds[number], bounds[number + 1], dtype=np.int64)
            for number, source in enumerate(self.stores.sources)
            if source.name in drawn
        ]
        return np.concatenate(parts)

    def num_rows(self, plan: CurriculumPlan, step: int) -> int:
        """How many rows are scored before `step` at most."""
        if self.options.rows == "all":
            return len(self.rows_to_score(plan, step))
        return min(len(self._reading(step)) * plan.global_batch, self.stores.num_rows)

    def _scorer(self, topology: Topology) -> RowScorer:
        stores, options = self.stores, self.options
        answers = None
        if self.writing is not None:
            answers = AnswerDrawing(
                writing=self.writing,
                per_prompt=options.generated.per_prompt,
                temperature=options.generated.temperature,
                batch=options.batch_rows,
                row_length=stores.spec.row_length,
                seed=self.config.run.seed,
                device=topology.device,
            )
        return RowScorer(
            options=options,
            rows=SourceRows(stores.sources),
            row_length=stores.spec.row_length,
            topology=topology,
            answers=answers,
            fixed_length=self.config.model.compile,
        )

    def in_plan(self, plan: CurriculumPlan) -> CurriculumPlan:
        """The plan with the scores."""
        assert self.scores is not None
        return plan.with_scores(self.scores)

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the scores into the checkpoint's folder; its manifest gets their step and digest."""
        if self.scores is None:
            return {"step": None}
        sha256 = self.scores.write(folder / FILE)
        return {"step": self.scores.step, "until": self.scored_until, "file": FILE, "sha256": sha256}

    def read(self, folder: Path, saved: Mapping[str, Any]) -> None:
        """Take back the scores of a checkpoint. Raises UserError where its file is damaged."""
        if saved["step"] is not None:
            path, step, sha256 = folder / str(saved["file"]), int(saved["step"]), str(saved["sha256"])
            self.scores = LiveScores.read(path, name=self.options.name, step=step, sha256=sha256)
            self.scored_until = saved["until"]


def figures_of(scores: LiveScores, options: Rescoring) -> dict[str, Any]:
    """What a line of metrics says: numbers of rows and documents, means over documents, histograms over [0, 1]."""
    known = scores.count > 0
    values = {name: scores.documents[name][known] for name in options.document_columns}
    shares = ["probability", "answer_probability", *([PASS_RATE] if options.measure == "generated" else [])]
    return {
        "rows": len(scores.rows),
        "documents": int(known.sum()),
        "means": {name: float(np.nanmean(found)) for name, found in values.items() if len(found)},
        "histograms": {
            name: np.histogram(values[name][~np.isnan(values[name])], bins=BINS, range=(0.0, 1.0))[0].tolist()
            for name in shares
        },
    }


def means_told(figures: Mapping[str, Any]) -> str:
    """The means of a line of metrics for the console; rows may hold no document with a trained position at all."""
    means = figures["means"]
    told = [f"{name} {means[name]:.4g}" for name in ("loss", "accuracy", "exact", PASS_RATE) if name in means]
    return ", ".join(told) or "none of them has a trained position"


def rescoring_decider(config: TrainConfig, checked: CheckedRun) -> RescoringDecider | None:
    """The decider of a run, None where it does not rescore."""
    if config.rescoring is None:
        return None
    spans = tuple((span.first_step, span.end_step, span.stage) for span in checked.plan.spans)
    return RescoringDecider(config, config.rescoring, checked.stores, checked.drawing, spans)


def rescoring_notes(config: TrainConfig, checked: CheckedRun, *, first_step: int) -> tuple[str, ...]:
    """What scoring from `first_step` on costs, in words; nothing where the run does not rescore."""
    decider = rescoring_decider(config, checked)
    if decider is None:
        return ()
    options, plan = decider.options, checked.plan
    counts: dict[int, int] = {}
    step = decider.next_step(first_step)
    while step is not None:
        counts[step] = decider.num_rows(plan, step)
        step = decider.next_step(step + 1)
    forwards = sum(-(-count // options.batch_rows) for count in counts.values())
    drawn = options.generated
    tokens = drawn.max_new_tokens or "its own answer's length"
    answers = f"; {drawn.per_prompt} answers of each document are drawn, a forward per token, {tokens} at most"
    return (
        f"rescoring {options.name!r}: {len(counts)} times, every {options.every_steps} steps, at most "
        f"{max(counts.values(), default=0):,} rows each; {forwards:,} forwards of {options.batch_rows} rows in all, "
        f"divided over the ranks{answers if options.measure == 'generated' else ''}",
    )


def saved_scores(config: TrainConfig, checkpoints: Sequence[Checkpoint], step: int) -> LiveScores | None:
    """The scores that a step of a run was trained by, from one of its checkpoints; None where none holds them."""
    if config.rescoring is None:
        return None
    every, found = config.rescoring.every_steps, None
    for checkpoint in checkpoints:
        saved = checkpoint.manifest.get("decisions", {}).get("rescoring", {"step": None})
        if saved["step"] is None or not saved["step"] <= step < (saved["step"] // every + 1) * every:
            continue
        if found is None or saved["step"] > found[1]["step"]:
            found = checkpoint.folder, saved
    if found is None or (found[1]["until"] is not None and step >= found[1]["until"]):
        return None
    folder, saved = found
    name = config.rescoring.name
    return LiveScores.read(folder / saved["file"], name=name, step=saved["step"], sha256=saved["sha256"])
