"""One training run from configuration to done marker: check, build, resume, loop, save."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from potstill.common.progress import Progress
from potstill.storage import Loader, StoreError, StoreReader
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.curriculum.plan import CurriculumPlan, describe
from potstill.student_train.data.step_batch import BatchFinisher, StepBatch
from potstill.student_train.data.stores import Stores
from potstill.student_train.evaluation.heldout import HeldoutEvaluation, SourcesEvaluation
from potstill.student_train.evaluation.written_answers import AnswerWriting
from potstill.student_train.model.checks import check_model
from potstill.student_train.model.parameters import active_parameters, count_parameters
from potstill.student_train.model.student import StudentModel, build_student
from potstill.student_train.run.checkpoint import Checkpoint, ResumeError, choose_resume, load_checkpoint
from potstill.student_train.run.deciders import build_deciders
from potstill.student_train.run.engine import (
    Topology,
    build_engine,
    check_deepspeed,
    deepspeed_config,
    gather_objects,
    on_main,
    start_distributed,
    world_from_environment,
    zero3_construction,
)
from potstill.student_train.run.hooks import Hooks
from potstill.student_train.run.legs import Legs
from potstill.student_train.run.loop import train_steps
from potstill.student_train.run.loop_state import LoopState
from potstill.student_train.run.metrics import (
    PEAK_FLOPS,
    Meter,
    MetricsLog,
    ModelCost,
    attention_spans,
    cut_metrics,
    flops_per_token,
    head_flops_per_position,
    head_width,
    read_metrics,
)
from potstill.student_train.run.preflight import CheckedRun, check_continuable, check_run
from potstill.student_train.run.run_base import RunBase
from potstill.student_train.run.run_folder import (
    DONE_FILE,
    check_run_folder,
    pinned_values,
    prepare_run_folder,
    report_changes,
    write_done,
    write_start,
)
from potstill.student_train.run.run_lock import ProcessMark, RunLock
from potstill.student_train.run.run_parts import Run, SelfChecks
from potstill.student_train.run.saves import Saves
from potstill.student_train.run.source_figures import source_totals
from potstill.student_train.run.step_watch import StepWatch
from potstill.student_train.run.stop import StopRequest
from potstill.student_train.run.summary import TrainSummary
from potstill.student_train.run.trackers import check_trackers
from potstill.student_train.run.train_lines import TrainLines
from potstill.student_train.run.universal import convert, needs_conversion, remove_universal_folders, universal_folder

log = logging.getLogger(__name__)
EVAL_PLACE = ("kind", "step", "tokens", "runtime_seconds")  # where a line of held-out figures stands in the run


def train(config: TrainConfig, *, checked: CheckedRun | None = None, hooks: Hooks | None = None) -> TrainSummary:
    """Train (or continue) the run of `config` in this process, which is one rank of the launcher's world.

    `checked` is what `check_run` gave for this configuration in this process, if it was called already. `hooks` are
    for an engine that runs this function in a worker of its own. Raises
    UserError (also StoreError of the storage room) before any model is built when configuration, stores and world do
    not fit; LossNotFiniteError during training.
    """
    started = time.monotonic()
    if config.run.num_threads is not None:
        torch.set_num_threads(config.run.num_threads)
    # Everything that needs no process group is checked before there is one, so that errors are plain.
    checked = checked or check_run(config, world_size=world_from_environment()[1])
    topology = start_distributed()
    on_main(topology, check_trackers, config.logging)
    with lock_run(config, topology) as lock:
        on_main(topology, prepare_run_folder, config)
        checkpoint = choose_resume(config.checkpoint, config.run.output_dir, topology)
        with open_run(config, topology, checked, checkpoint, lock, hooks or Hooks()) as run:
            summary = train_to_the_end(run, started)
        torch.distributed.barrier()
    return summary


@contextmanager
def lock_run(config: TrainConfig, topology: Topology) -> Iterator[RunLock]:
    """While open, this run alone writes to its folder. Raises RunHeldError on all ranks where another one does."""
    on_main(topology, check_run_folder, config)  # nothing is put into a folder that is no run's
    lock = RunLock(config.run.output_dir, tuple(gather_objects(ProcessMark.here(topology.rank))))
    on_main(topology, lock.take)
    try:
        yield lock
    finally:
        if topology.is_main:
            lock.give_back()


def train_to_the_end(run: Run, started: float) -> TrainSummary:
    """Take the steps that are left, and mark the run as done if these were all."""
    done, is_main = run.state.step, run.topology.is_main
    with Progress(run.plan.total_steps, done=done, unit="steps", description="train", enabled=is_main) as progress:
        status = train_steps(run, progress)
    summary = summarise(run, status, seconds=time.monotonic() - started)
    if summary.is_done:
        about = {"step": summary.steps, "tokens": summary.tokens, "heldout": summary.heldout}
        on_main(run.topology, write_done, run.folder, about)
    return summary


def build_model(
    config: TrainConfig, topology: Topology, stores: Stores, student_config: Any, ds_config: dict[str, Any]
) -> tuple[StudentModel, Any]:
    """The student and the engine around it, looked at before anything trains (run.self_check). Raises UserError."""
    with zero3_construction(ds_config):
        student = build_student(config.model, student_config, seed=config.run.seed)
        engine = build_engine(student, config, ds_config, topology)
    if config.run.self_check:
        rows, row_length = config.data.micro_batch_rows, stores.spec.row_length
        check_model(engine, student, micro_batch_rows=rows, row_length=row_length, vocab_size=stores.vocab_size)
    return student, engine


@contextmanager
def open_run(
    config: TrainConfig,
    topology: Topology,
    checked: CheckedRun,
    checkpoint: Checkpoint | None,
    lock: RunLock,
    hooks: Hooks,
) -> Iterator[Run]:
    """Build model, engine, loader and figures, and bring them to where the checkpoint stands."""
    stores, plan, student_config = checked.stores, checked.plan, checked.student_config
    universal = checkpoint is not None and needs_conversion(checkpoint, topology.world_size)
    ds_config = deepspeed_config(config, world_size=topology.world_size, load_universal=universal)
    check_deepspeed(ds_config)
    if checkpoint is not None:
        check_continuable(checkpoint, config, plan, student_config)
        on_main(topology, report_changes, config)
    on_main(topology, start_run_folder, config, student_config, ds_config, plan)
    student, engine = build_model(config, topology, stores, student_config, ds_config)
    open_leg = partial(open_loader, config, topology, stores, student)
    legs = Legs(plan, open_leg, deciders=build_deciders(config, checked), device=topology.device)
    metrics: MetricsLog | None = None
    try:
        state = resume(engine, legs, checkpoint, config, topology, universal=universal)
        metrics = MetricsLog(config.run.output_dir, config.logging, name=config.run.name, hooks=hooks)
        on_main(topology, metrics.open)
        limit = config.run.max_runtime_minutes
        with StopRequest(config.run.output_dir, max_runtime_minutes=limit, ask=hooks.stop_reason) as stop:
            base = RunBase(config, topology, engine, legs, state, lock)
            saves = Saves(
                base,
                pinned=pinned_values(config),
                extra={"stores": stores.digests(), "num_parameters": count_parameters(student)},
                last=None if checkpoint is None else str(checkpoint.folder),
                hooks=hooks,
            )
            watch = StepWatch(base, metrics=metrics, stop=stop, saves=saves)
            meter = Meter(topology.device, student.sum_names, sources=plan.source_names)
            cost = model_cost(student, student_config, stores.spec.row_length, topology)
            yield Run(
                **vars(base),
                watch=watch,
                self_checks=SelfChecks(wanted=config.run.self_check),
                meter=meter,
                metrics=metrics,
                lines=TrainLines(base, watch=watch, meter=meter, metrics=metrics, cost=cost),
                saves=saves,
                evaluation=heldout_evaluation(config, stores, topology, checked.writing),
                sampler=checked.sampler,
                num_parameters=count_parameters(student),
            )
    finally:
        legs.close()
        if metrics is not None:
            metrics.close()
        engine.destroy()


def open_loader(
    config: TrainConfig,
    topology: Topology,
    stores: Stores,
    student: StudentModel,
    plan: CurriculumPlan,
    first_step: int,
    end_step: int,
) -> Loader[StepBatch]:
    """This rank's loader of the steps [first_step, end_step), whose threads make finished micro-batches."""
    return Loader(
        plan,
        stores.sources,
        finish=BatchFinisher(
            plan=plan,
            micro_batch_rows=config.data.micro_batch_rows,
            row_length=stores.spec.row_length,
            terms=student.terms,
            device=topology.device,
            fixed_length=config.model.compile,
        ),
        rank=topology.rank,
        world=topology.world_size,
        prefetch_batches=config.data.prefetch_batches,
        num_threads=config.data.num_threads,
        first_batch=first_step,
        end_batch=end_step,
    )


def resume(
    engine: Any,
    legs: Legs,
    checkpoint: Checkpoint | None,
    config: TrainConfig,
    topology: Topology,
    *,
    universal: bool,
) -> LoopState:
    """Load the checkpoint, if there is one, and say in one line what was done. Returns the loop state."""
    run = config.run.output_dir
    if checkpoint is None:
        log.info("starting at step 0 (checkpoint.resume %s; no checkpoint in %s)", config.checkpoint.resume, run)
        on_main(topology, cut_metrics, run, -1)  # what was decided before step 0 is decided again
        legs.start(0)
        return LoopState()
    state = checkpoint.state()
    try:
        legs.resume(state.step, checkpoint.folder, checkpoint.manifest)
    except StoreError as error:
        raise ResumeError(f"{checkpoint.folder} was trained on other data: {error}") from error
    folder = checkpoint.folder
    on_main(topology, remove_universal_folders, checkpoint)
    if universal:
        folder = universal_folder(checkpoint)
        on_main(topology, convert, checkpoint, folder)
    load_checkpoint(engine, folder, step=state.step, universal=universal)
    torch.distributed.barrier()
    if universal:
        on_main(topology, remove_universal_folders, checkpoint)
    on_main(topology, cut_metrics, run, state.step)
    log.info(
        "resuming at step %d from %s (saved by %d ranks, now %d%s)",
        state.step,
        checkpoint.folder,
        checkpoint.world_size,
        topology.world_size,
        "; through the universal format" if universal else "",
    )
    return state


def start_run_folder(config: TrainConfig, student_config: Any, ds_config: dict[str, Any], plan: CurriculumPlan) -> None:
    """Take away the mark of an earlier end, and write what is resolved before the first step."""
    (config.run.output_dir / DONE_FILE).unlink(missing_ok=True)
    write_start(config, student_config, ds_config, describe(plan))


def heldout_evaluation(
    config: TrainConfig, stores: Stores, topology: Topology, writing: AnswerWriting | None
) -> HeldoutEvaluation | SourcesEvaluation | None:
    """The evaluation of a run, if it has held-out rows, of its own or of its sources."""

    def of(tokens: StoreReader, targets: StoreReader | None) -> HeldoutEvaluation:
        return HeldoutEvaluation.create(
            tokens,
            targets,
            max_rows=config.eval.max_rows,
            batch_rows=config.data.micro_batch_rows,
            rank=topology.rank,
            world_size=topology.world_size,
            device=topology.device,
            fixed_length=config.model.compile,
            writing=writing,
        )

    whole = None if stores.heldout is None else of(stores.heldout, stores.heldout_targets)
    if not stores.source_heldout:
        return whole
    return SourcesEvaluation({name: of(own.tokens, own.targets) for name, own in stores.source_heldout.items()}, whole)


def model_cost(student: StudentModel, student_config: Any, row_length: int, topology: Topology) -> ModelCost:
    """FLOPs per token (by active parameters) and trained position, and the device's peak if it is in the table."""
    text = student_config.get_text_config()
    vocab, width = student.hf.lm_head.out_features, student.hf.lm_head.in_features
    tables = 1 if text.tie_word_embeddings else 2
    name = torch.cuda.get_device_name(topology.device) if topology.device.type == "cuda" else "cpu"
    active, spans = active_parameters(student, text), attention_spans(text, row_length)
    per_token = None
    if active is not None and spans is not None:
        backbone = active - tables * vocab * width
        heads = text.num_attention_heads * head_width(text)
        per_token = flops_per_token(backbone_parameters=backbone, attention_spans=spans, attention_width=heads)
    return ModelCost(
        per_token=per_token,
        per_position=head_flops_per_position(hidden_size=width, vocab_size=vocab),
        peak=PEAK_FLOPS.get(name),
    )


def summarise(run: Run, status: str, *, seconds: float) -> TrainSummary:
    """Gather the last figures; the same on every rank but for `last` and `heldout`, which rank 0's file holds."""
    records = read_metrics(run.folder) if run.topology.is_main else []
    last: dict[str, dict[str, Any]] = {record["kind"]: record for record in records}
    return TrainSummary(
        status=status,
        output_dir=run.folder,
        steps=run.state.step,
        total_steps=run.plan.total_steps,
        tokens=run.state.tokens,
        num_parameters=run.num_parameters,
        seconds=seconds,
        last=last.get("train", {}),
        heldout={name: value for name, value in last.get("eval", {}).items() if name not in EVAL_PLACE},
        sources=source_totals(record for record in records if record["kind"] == "train"),
    )
