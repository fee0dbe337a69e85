"""The train loop, and the small things that belong to it: agreement of the ranks, lines of metrics, saves."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from potstill.common.errors import UserError
from potstill.common.progress import Progress
from potstill.storage import LoadedBatch, Loader
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.curriculum.plan import CurriculumPlan, rows_digest
from potstill.student_train.data.batch import MicroBatch, collate
from potstill.student_train.evaluation.heldout import HeldoutEvaluation, evaluation_line
from potstill.student_train.evaluation.samples import ON_CONSOLE, TextSampler, sample_line
from potstill.student_train.model.student import TrainRequest
from potstill.student_train.run.checkpoint import apply_retention, checkpoint_folder, save_checkpoint
from potstill.student_train.run.engine import Topology, all_reduce_sum, plain_gradient_norm, set_learning_rate
from potstill.student_train.run.metrics import Meter, MetricsLog, ModelCost, loss_figures, peak_memory_bytes
from potstill.student_train.run.spikes import LossSpikeError, remember
from potstill.student_train.run.stop import StopRequest
from potstill.student_train.run.write_failures import ROOM

log = logging.getLogger(__name__)


class MetricsWriteError(UserError):
    """A line of metrics could not be written; the message names the folder, the cause and the last checkpoint."""


class LossNotFiniteError(UserError):
    """The loss became NaN or infinite; the message says at which step, on which rows, and what was saved."""


@dataclass
class Run:
    """Everything one training process works with."""

    config: TrainConfig
    topology: Topology
    engine: Any
    plan: CurriculumPlan
    loader: Loader
    row_length: int
    meter: Meter
    metrics: MetricsLog
    stop: StopRequest
    evaluation: HeldoutEvaluation | None
    sampler: TextSampler | None
    pinned: dict[str, Any]
    checkpoint_extra: dict[str, Any]
    cost: ModelCost
    loop: dict[str, Any] = field(default_factory=lambda: {"step": 0, "tokens": 0, "skipped": 0, "runtime_seconds": 0.0})
    last_saved: str | None = None
    bad_loss: torch.Tensor | None = None  # 0-d: > 0 once a local loss of an unchecked step was not finite
    step_loss: torch.Tensor | None = None  # 0-d: this rank's share of the unchecked step's global loss
    checked_stages: set[int] = field(default_factory=set)
    plain_norm: torch.Tensor | None = None  # 0-d: gradient norm of the last step, where the optimizer keeps none
    lr: float = 0.0
    waited_seconds: float = 0.0

    @property
    def folder(self) -> Path:
        return self.config.run.output_dir


def train_steps(run: Run, progress: Progress) -> str:
    """Train to the last step. Returns "done", or why it stopped before; the run is saved either way."""
    world_size = run.topology.world_size
    if run.loop["step"] >= run.plan.total_steps:
        return "done"
    for batch in run.loader:
        objective = run.plan.objective(batch.batch)
        options = {"micro_batch_rows": run.config.data.micro_batch_rows, "row_length": run.row_length}
        micros = collate(batch, objective, terms=run.engine.module.terms, **options)
        normalizer, reason = agree(run, micros)
        if reason is not None:
            save(run)
            return reason
        run.lr = run.config.optimizer.lr * run.plan.lr_factor(batch.batch)
        set_learning_rate(run.engine, run.lr)
        for micro in micros:
            placed, check = micro.to(run.topology.device), check_due(run)
            loss, sums = run.engine(TrainRequest(placed, objective, normalizer, len(micros), self_check=check))
            # Times 1: DeepSpeed 0.19 divides by the accumulation after all when it gets the module's own output.
            run.engine.backward(loss * 1.0, scale_wrt_gas=False)
            run.plain_norm = plain_gradient_norm(run.engine)
            run.engine.step()
            note_micro_batch(run, micro, loss / world_size, sums)
        run.loader.commit(batch.batch)
        after_step(run, batch)
        progress.update()
        if run.loop["step"] == run.plan.total_steps:
            return "done"
    raise AssertionError("the loader of a plan without end has ended")


def agree(run: Run, micros: list[MicroBatch]) -> tuple[torch.Tensor, str | None]:
    """One small all-reduce: the step's global weight sum, whether to stop, and how the last loss was.

    Returns the normalizer (0-d float32) and the reason to stop, if any rank has one. The normalizer is the weight sum
    over the number of ranks, because DeepSpeed then averages gradients over ranks. Raises LossNotFiniteError,
    LossSpikeError and MetricsWriteError, and UserError when the token selector left nothing to train on.
    """
    reason = run.stop.reason()
    values = torch.tensor(
        [sum(micro.weight_sum for micro in micros), float(reason is not None), 0.0, 0.0, 0.0],
        dtype=torch.float64,
        device=run.topology.device,
    )
    values[2:] = unchecked(run)
    weight, stop, *last = all_reduce_sum(values).tolist()
    check_last_step(run, *last)
    if stop:
        return values[0], reason or "another rank's request"
    if weight <= 0:
        raise UserError(
            f"step {run.loop['step']}: no position of the global batch is selected, so there is nothing to train on; "
            "widen the token selector (share, floor, max_rank) of this stage"
        )
    return (values[0] / run.topology.world_size).float(), None


def check_due(run: Run) -> bool:
    """True once per stage and process: the stage's loss path is then compared with float64 before it is trusted."""
    stage = run.plan.segment(run.loop["step"]).span.index
    due = run.config.run.self_check and stage not in run.checked_stages
    run.checked_stages.add(stage)
    return due


def unchecked(run: Run) -> torch.Tensor:
    """[3] float64, this rank's since the last look: > 0 when a loss or gradient was not finite; share of the loss;
    1 when a line of metrics could not be written."""
    values = torch.zeros(3, dtype=torch.float64, device=run.topology.device)
    values[0] = float(run.engine.skipped_steps - run.loop["skipped"])
    if run.bad_loss is not None and run.step_loss is not None:
        values[0] += run.bad_loss
        values[1] = run.step_loss
    values[2] = float(run.metrics.failure is not None)
    return values


def check_last_step(run: Run, bad: float, loss: float, unwritten: float) -> None:
    """Judge the step since the last look, if there was one, and the metrics, by their all-reduced figures."""
    was_step = run.step_loss is not None
    run.bad_loss = run.step_loss = None
    check_finite(run, bad)
    if was_step and run.config.spike_policy != "off":
        check_spike(run, loss)
    if unwritten:
        found = run.metrics.failure
        raise MetricsWriteError(
            f"step {run.loop['step']}: a line of metrics could not be written in {run.folder}: "
            f"{'see the message of rank 0' if found is None else found}. Nothing is saved behind it. Last checkpoint: "
            f"{run.last_saved or 'none'}. Please {ROOM} and start the same command again: the run resumes from there"
        ) from found


def check_spike(run: Run, loss: float) -> None:
    """Warn of a loss far above the window, or stop. Raises LossSpikeError with the step, its rows and the figures."""
    config, step = run.config, run.loop["step"] - 1
    stage = run.plan.segment(step).span.index
    spike = remember(run.loop, loss, stage=stage, window=config.spike_window, sigma=config.spike_sigma)
    if spike is None:
        return
    rows = ", ".join(str(row) for row in run.plan.rows(step).tolist())
    found = f"step {step} is a loss spike: {spike.format(sigma=config.spike_sigma)}. Rows of its global batch: {rows}"
    if config.spike_policy == "warn":
        if run.topology.is_main:
            log.warning("%s. Spikes of this run so far: %d", found, run.loop["spikes"])
        return
    raise LossSpikeError(
        f"{found}. Nothing was saved after it. Last checkpoint: {run.last_saved or 'none'}; metrics up to here are in "
        f"{run.folder / 'metrics.jsonl'}. Look at these rows (potstill inspect), lower optimizer.lr, raise "
        "spike_sigma, or set spike_policy: warn, then start again: the run resumes from that checkpoint"
    )


def check_finite(run: Run, bad: float) -> None:
    """Stop on a loss that was not finite. Raises LossNotFiniteError with the step, its rows and what is saved."""
    step = run.loop["step"] - 1
    if not bad:
        return
    rows = ", ".join(str(row) for row in run.plan.rows(step).tolist())
    if run.config.nan_policy == "skip":
        run.loop["skipped"] = int(run.engine.skipped_steps)
        log.warning("step %d was not finite; its update was skipped. Rows of its global batch: %s", step, rows)
        return
    raise LossNotFiniteError(
        f"the loss of step {step} is not finite. Rows of its global batch: {rows}. "
        f"Last checkpoint: {run.last_saved or 'none'}; metrics up to here are in {run.folder / 'metrics.jsonl'}. "
        "Lower optimizer.lr, lengthen schedule.warmup, or look at these rows (potstill inspect), then start again: "
        "the run resumes from that checkpoint"
    )


def note_micro_batch(run: Run, micro: MicroBatch, loss: torch.Tensor, sums: torch.Tensor) -> None:
    """Add one micro-batch to the figures, and remember on the device its loss and whether it was finite."""
    run.meter.add(loss, sums, micro.labels.shape[0])
    share = loss.detach().double()
    bad = (~torch.isfinite(share)).double()
    run.bad_loss = bad if run.bad_loss is None else run.bad_loss + bad
    run.step_loss = share if run.step_loss is None else run.step_loss + share


def after_step(run: Run, batch: LoadedBatch) -> None:
    """Count the step; write metrics, evaluate and save where they are due."""
    config, loop = run.config, run.loop
    loop["step"] = step = batch.batch + 1
    run.meter.end_step(rows_digest(run.plan.rows(batch.batch)))
    last = step == run.plan.total_steps
    save_due = last or (config.checkpoint.every_steps is not None and step % config.checkpoint.every_steps == 0)
    if step % config.logging.every_steps == 0:
        log_line(run)
    if last or (config.eval.every_steps is not None and step % config.eval.every_steps == 0):
        if run.evaluation is not None:
            evaluate(run, run.evaluation)
        if run.sampler is not None:
            sample(run, run.sampler)
    if save_due:
        save(run)


def evaluate(run: Run, evaluation: HeldoutEvaluation) -> None:
    """Measure on the held-out rows and write the figures; the time that it takes is no time of training.

    It ends a line of metrics, so that the figures stand at the tokens that the model has seen.
    """
    settle(run)
    if run.meter.digests:
        log_line(run)
    with run.meter.paused():
        figures = evaluation.measure(run.engine)
    run.metrics.write({"kind": "eval", **place(run), **figures})
    if run.topology.is_main:
        log.info("step %d/%d %s", run.loop["step"], run.plan.total_steps, evaluation_line(figures))


def sample(run: Run, sampler: TextSampler) -> None:
    """Write texts, a line of metrics that holds them all, and the first few of them to the console."""
    settle(run)
    if run.meter.digests:
        log_line(run)
    with run.meter.paused():
        texts = sampler.write(run.engine, device=run.topology.device)
    run.metrics.write({"kind": "sample", **place(run), "temperature": sampler.temperature, "samples": texts})
    if run.topology.is_main:
        for text in texts[:ON_CONSOLE]:
            log.info("step %d/%d %s", run.loop["step"], run.plan.total_steps, sample_line(text))


def place(run: Run) -> dict[str, Any]:
    """Where in the run a line of figures stands."""
    return {name: run.loop[name] for name in ("step", "tokens", "runtime_seconds")}


def settle(run: Run) -> None:
    """Let all ranks look at the last loss and line of metrics now, before anything is built on the step."""
    check_last_step(run, *all_reduce_sum(unchecked(run)).tolist())


def log_line(run: Run) -> None:
    """Write one line of metrics over the steps since the last one."""
    seconds = run.meter.seconds()
    sums, losses = run.meter.reduce()
    num_steps = len(losses)
    waited = run.loader.data_wait_seconds
    run.loop["tokens"] += int(sums["tokens"])
    run.loop["runtime_seconds"] += seconds
    norm = run.engine.get_global_grad_norm() if run.plain_norm is None else run.plain_norm
    record = {
        "kind": "train",
        "step": run.loop["step"],
        "tokens": run.loop["tokens"],
        "stage": run.plan.segment(run.loop["step"] - 1).span.name,
        "loss": sum(losses) / num_steps,
        **loss_figures(sums),
        "lr": run.lr,
        "grad_norm": None if norm is None else float(norm),
        "skipped_steps": int(run.engine.skipped_steps),
        **({} if run.config.spike_policy == "off" else {"loss_spikes": run.loop.get("spikes", 0)}),
        "tokens_per_second": sums["tokens"] / seconds,
        "mfu": run.cost.utilisation(sums, seconds=seconds, world_size=run.topology.world_size),
        "flops_saved_share": run.cost.saved_share(sums),
        "row_share": run.plan.row_share(run.loop["step"] - 1),
        "step_seconds": seconds / num_steps,
        "data_wait_seconds": waited - run.waited_seconds,
        "peak_memory_bytes": peak_memory_bytes(run.topology.device),
        "runtime_seconds": run.loop["runtime_seconds"],
        "step_losses": losses,
        "row_digests": run.meter.digests,
    }
    run.waited_seconds = waited
    run.metrics.write(record)
    if run.topology.is_main:
        log.info("step %d/%d loss %.4f lr %.3g", run.loop["step"], run.plan.total_steps, record["loss"], run.lr)
    run.meter.reset()


def save(run: Run) -> None:
    """Commit a checkpoint on all ranks, after the last loss proved finite.

    A save ends a line of metrics too, so that a resumed run writes the same lines as an uninterrupted one.
    """
    folder = checkpoint_folder(run.folder, run.loop["step"])
    if run.last_saved is not None and Path(run.last_saved).resolve() == folder.resolve():
        return  # nothing was trained since: writing it again would only put a whole checkpoint at risk
    settle(run)
    if run.meter.digests:
        log_line(run)
        settle(run)  # the checkpoint says that the lines before it are written
    with run.meter.paused():
        save_checkpoint(
            run.engine,
            run=run.folder,
            topology=run.topology,
            loop=run.loop,
            data=run.loader.state_dict(),
            pinned=run.pinned,
            extra=run.checkpoint_extra,
            last_saved=run.last_saved,
        )
        run.last_saved = str(folder)
        if run.topology.is_main:
            apply_retention(run.config.checkpoint, run.folder)
