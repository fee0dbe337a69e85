"""The train loop, and what comes behind its steps: lines of metrics, evaluations, texts, saves."""

from __future__ import annotations

import logging
from typing import Any

import torch

from potstill.common.errors import UserError
from potstill.common.progress import Progress
from potstill.student_train.data.batch import MicroBatch
from potstill.student_train.data.step_batch import StepBatch
from potstill.student_train.evaluation.heldout import HeldoutEvaluation, SourcesEvaluation, evaluation_line
from potstill.student_train.evaluation.samples import ON_CONSOLE, TextSampler, sample_line
from potstill.student_train.model.student import TrainRequest
from potstill.student_train.run.engine import plain_gradient_norm, set_learning_rate
from potstill.student_train.run.legs import DecisionPoint
from potstill.student_train.run.optimizer_state import clear_optimizer
from potstill.student_train.run.run_parts import Run
from potstill.student_train.run.step_watch import GlobalSums

log = logging.getLogger(__name__)


def train_steps(run: Run, progress: Progress) -> str:
    """Train to the last step. Returns "done", or why it stopped before; the run is saved either way."""
    world_size = run.topology.world_size
    if run.state.step >= run.plan.total_steps:
        return "done"
    run.watch.settle()  # who was asked to stop before the first step trains none
    decide(run, None)
    for batch in run.legs:
        normalizer, kd_scale, reason = agree(run, batch)
        if reason is not None:
            save(run)
            return reason
        if run.plan.restarts_optimizer(batch.batch):
            restart_optimizer(run)
        run.lines.lr = run.config.optimizer.lr * run.plan.lr_factor(batch.batch)
        set_learning_rate(run.engine, run.lines.lr)
        for micro in run.legs.on_device(batch):
            count, check = len(batch.micros), check_due(run, micro, batch)
            request = TrainRequest(
                micro,
                batch.objective,
                normalizer,
                count,
                self_check=check,
                kd_scale=kd_scale,
                num_sources=len(run.plan.source_names),
            )
            loss, sums = run.engine(request)
            # Times 1: DeepSpeed 0.19 divides by the accumulation after all when it gets the module's own output.
            run.engine.backward(loss * 1.0, scale_wrt_gas=False)
            run.lines.plain_norm = plain_gradient_norm(run.engine)
            run.engine.step()
            note_micro_batch(run, micro, loss / world_size, sums)
        run.legs.commit(batch.batch)
        after_step(run, batch)
        progress.update()
        if run.state.step == run.plan.total_steps:
            return "done"
    raise AssertionError(f"the batches ended before step {run.state.step}, not at the last one")


def restart_optimizer(run: Run) -> None:
    """Forget the optimizer's moments at the first step of a stage; a run that resumes there does it as well."""
    clear_optimizer(run.engine.optimizer)
    if run.topology.is_main:
        stage = run.plan.segment(run.state.step).span.name
        log.info("step %d: stage %s begins with an optimizer without moments", run.state.step, stage)


def agree(run: Run, batch: StepBatch) -> tuple[torch.Tensor, torch.Tensor | None, str | None]:
    """The step's normalizer and the factor of its KD weights (float32 [], on the device), and the reason to stop.

    The normalizer is the global weight sum over the number of ranks, because DeepSpeed then averages gradients over
    ranks. The factor, None where rows and documents have no weights of KD alone, makes the mean of these 1 over the
    global batch; where they are all 0 there is no KD (step_normalizer has both). The reason is given if any rank has
    one to stop before the step. Raises what StepWatch.read raises of an earlier step, and UserError when there is
    nothing to train on, unless that is by scores that the run has made itself (rescoring): the normalizer is then 1.
    """
    sums, reason = run.watch.begin_step(batch.weight_sum, batch.kd_weight_sum, batch.unit_sums)
    # A rank with a position of its own knows, without asking the device, that the sum of all ranks is not 0.
    is_empty = reason is None and batch.weight_sum <= 0 and float(sums.weight) <= 0
    if is_empty and not run.plan.weighs_by_scores(batch.batch):
        raise UserError(
            f"step {run.state.step}: no position of the global batch is selected, so there is nothing to train on; "
            "widen the token selector (share, floor, max_rank) of this stage, or the form of its weights, and see that "
            "its rows have trained positions (masks)"
        )
    weight, kd_scale = step_normalizer(sums, weighs_kd=batch.weighs_kd, means_units=batch.means_units)
    if is_empty:
        # By what the student can do now no document of this batch counts: the step's loss is 0.
        run.lines.empty_steps += 1
        weight = torch.ones_like(weight)
    return (weight / run.topology.world_size).float(), kd_scale, reason


def step_normalizer(
    sums: GlobalSums, *, weighs_kd: bool, means_units: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the sum of the step's losses is divided by (float64 []), and the factor of its KD weights (float32 []).

    The weights' mean over the positions, each with its row's or document's weight, is 1 if the sum is divided by the
    sum of the weights. If the mean shall be over the rows or documents themselves, it is divided by the number of
    chosen positions times that mean.
    """
    if not weighs_kd:
        of_units = sums.chosen * sums.unit_weight / sums.units
        return (of_units if means_units else sums.weight), None
    above, below = (sums.units, sums.unit_weight) if means_units else (sums.weight, sums.kd_weight)
    return sums.weight, torch.where(below > 0, above / below, 0.0).float()


def check_due(run: Run, micro: MicroBatch, batch: StepBatch) -> bool:
    """True once per stage and process: the stage's loss path is then compared with float64 before it is trusted.

    A micro-batch without a position to train on says nothing of it, nor does one of sources without targets where
    others have them.
    """
    whole = micro.num_active != 0 and (micro.targets is not None or batch.objective.targets is None)
    return whole and run.self_checks.due(run.plan.segment(run.state.step).span.index)


def note_micro_batch(run: Run, micro: MicroBatch, loss: torch.Tensor, sums: torch.Tensor) -> None:
    """Add one micro-batch to the figures, and remember on the device its loss [] and whether it was finite."""
    run.meter.add(loss, sums, micro.labels.shape[0])
    run.watch.note(loss)


def after_step(run: Run, batch: StepBatch) -> None:
    """Count the step; write metrics, evaluate and save where they are due."""
    config = run.config
    run.state.step = step = batch.batch + 1
    run.meter.end_step(batch.rows_digest, batch.source_counts)
    last = step == run.plan.total_steps
    save_due = last or (config.checkpoint.every_steps is not None and step % config.checkpoint.every_steps == 0)
    if step % config.logging.every_steps == 0:
        run.lines.end()
    heldout: dict[str, Any] | None = None
    if last or (config.eval.every_steps is not None and step % config.eval.every_steps == 0):
        if run.evaluation is not None:
            heldout = evaluate(run, run.evaluation)
        if run.sampler is not None:
            sample(run, run.sampler)
    decide(run, heldout)  # before a checkpoint, which holds what the next step is trained by
    if save_due:
        save(run)


def decide(run: Run, heldout: dict[str, Any] | None) -> None:
    """Let all that is due before the next step be decided (legs.py), and write a line of metrics of each.

    It ends a line of metrics: that of the steps before is of the plan that they were trained by.
    """
    if not run.legs.is_due(run.state.step):
        return
    run.watch.settle()
    if run.lines.is_open:
        run.lines.end()
    every = run.config.eval.every_steps
    with run.meter.paused():
        if heldout is None and run.evaluation is not None and every and run.state.step and run.state.step % every == 0:
            heldout = run.evaluation.measure(run.engine)  # of a run that ended here and was made longer
        found = run.legs.decide(DecisionPoint(run, heldout))
    for name, figures in found:
        run.metrics.write({"kind": name, **place(run), **figures})


def evaluate(run: Run, evaluation: HeldoutEvaluation | SourcesEvaluation) -> dict[str, Any]:
    """Measure on the held-out rows, write the figures and return them; the time that it takes is no time of training.

    It ends a line of metrics, so that the figures stand at the tokens that the model has seen.
    """
    run.watch.settle()
    if run.lines.is_open:
        run.lines.end()
    with run.meter.paused():
        figures = evaluation.measure(run.engine)
    run.metrics.write({"kind": "eval", **place(run), **figures})
    if run.topology.is_main:
        log.info("step %d/%d %s", run.state.step, run.plan.total_steps, evaluation_line(figures))
    return figures


def sample(run: Run, sampler: TextSampler) -> None:
    """Write texts, a line of metrics that holds them all, and the first few of them to the console."""
    run.watch.settle()
    if run.lines.is_open:
        run.lines.end()
    with run.meter.paused():
        texts = sampler.write(run.engine, device=run.topology.device)
    run.metrics.write({"kind": "sample", **place(run), "temperature": sampler.temperature, "samples": texts})
    if run.topology.is_main:
        for text in texts[:ON_CONSOLE]:
            log.info("step %d/%d %s", run.state.step, run.plan.total_steps, sample_line(text))


def place(run: Run) -> dict[str, Any]:
    """Where in the run a line of figures stands."""
    return {name: getattr(run.state, name) for name in ("step", "tokens", "runtime_seconds")}


def save(run: Run) -> None:
    """Commit a checkpoint on all ranks, after the last loss proved finite.

    A save ends a line of metrics too, so that a resumed run writes the same lines as an uninterrupted one.
    """
    if run.saves.is_current:
        return  # nothing was trained since
    run.watch.settle()
    if run.lines.is_open:
        run.lines.end()
        run.watch.settle()  # the checkpoint says that the lines before it are written
    with run.meter.paused():
        run.saves.write()
