"""Everything that can be checked before a rank starts, in one place: the command does it once, each rank its own part.

`check_run` needs no process group, no device and writes nothing; every rank calls it, whoever started it.
`check_start` is what the command does before it starts ranks (and all that `--dry-run` does): it also looks at the
machine, the run folder and the checkpoint that would be resumed.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch

from potstill.common.errors import UserError
from potstill.storage import Loader, StoreError
from potstill.student_train.config.batch_arithmetic import accumulation_steps
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.curriculum.plan import CurriculumPlan
from potstill.student_train.data.rows_read import check_rows_held
from potstill.student_train.data.stores import Stores, build_plan, check_objectives, open_stores
from potstill.student_train.evaluation.drawn_answers import drawn_writing
from potstill.student_train.evaluation.samples import TextSampler, text_sampler
from potstill.student_train.evaluation.written_answers import AnswerWriting, answer_writing_of
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.run.checkpoint import Checkpoint, ResumeError, check_pinned, find_resume
from potstill.student_train.run.engine import check_deepspeed, deepspeed_config
from potstill.student_train.run.run_folder import check_run_folder, check_student, pinned_values
from potstill.student_train.run.run_lock import refuse_running
from potstill.student_train.run.trackers import check_trackers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedRun:
    """The stores, the plan and the student of a configuration that fit each other and the number of ranks."""

    stores: Stores
    plan: CurriculumPlan
    student_config: Any  # of transformers
    accumulation: int  # micro-batches per rank and step
    sampler: TextSampler | None  # of the texts that the run writes, if it shall
    writing: AnswerWriting | None  # of the held-out answers that it writes, if it shall
    drawing: AnswerWriting | None  # of the answers that rescoring draws, if it does


@dataclass(frozen=True)
class Machine:
    """What ranks would run on here."""

    device: str  # "cuda" or "cpu"
    count: int  # GPUs, or cores that this process may use


@dataclass(frozen=True)
class CheckedStart:
    """A start that nothing stands against."""

    config: TrainConfig
    num_ranks: int
    run: CheckedRun
    machine: Machine
    checkpoint: Checkpoint | None  # that it would continue from
    notes: tuple[str, ...]  # what a person should know before it starts


def check_run(config: TrainConfig, *, world_size: int) -> CheckedRun:
    """Check configuration, stores, curriculum, batch and student against each other.

    Raises UserError (also StoreError of the storage room) that names key, found, expected and what to do.
    """
    accumulation = accumulation_steps(config, world_size)
    stores = open_stores(config)
    check_objectives(config, stores)
    plan = build_plan(config, stores)
    check_rows_held(plan, stores)
    sampler = text_sampler(config, stores)
    student = hf_config(config.model, vocab_size=stores.vocab_size, row_length=stores.spec.row_length)
    writing, drawing = answer_writing_of(config, stores, student), drawn_writing(config, stores, student)
    return CheckedRun(stores, plan, student, accumulation, sampler, writing, drawing)


def check_start(config: TrainConfig, *, num_ranks: int, planning: bool = False) -> CheckedStart:
    """Check all that a start of `num_ranks` ranks on this machine needs; nothing is written. Raises UserError.

    With `planning` the ranks need not fit this machine: what does not is a note.
    """
    if not planning:
        refuse_running(config.run.output_dir)
    machine = this_machine()
    notes = check_machine(machine, num_ranks, planning=planning)
    checked = check_run(config, world_size=num_ranks)
    check_trackers(config.logging)
    if config.deepspeed:  # ours alone are known to be fine, and importing DeepSpeed takes seconds
        check_deepspeed(deepspeed_config(config, world_size=num_ranks))
    checkpoint = check_resume(config, checked)
    return CheckedStart(config, num_ranks, checked, machine, checkpoint, notes)


def this_machine() -> Machine:
    """The devices that ranks on this machine would take; makes no CUDA context."""
    if torch.cuda.is_available():
        return Machine("cuda", torch.cuda.device_count())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine("cpu", cores)


def check_machine(machine: Machine, num_ranks: int, *, planning: bool) -> tuple[str, ...]:
    """Notes on more ranks than cores. Raises UserError on more ranks than GPUs, unless `planning`."""
    if num_ranks <= machine.count:
        return ()
    if machine.device == "cuda":
        found = f"--num-ranks {num_ranks}, but this machine has {machine.count} GPU(s) and each rank needs its own"
        if not planning:
            raise UserError(
                f"{found}; take --num-ranks {machine.count} or less, or start the ranks on several machines with "
                "deepspeed or torchrun (potstill train --help)"
            )
        return (found,)
    share = num_ranks / machine.count
    return (
        f"--num-ranks {num_ranks} on {machine.count} core(s): about {share:.3g} ranks share a core, each with a model "
        f"of its own; expect steps that take at least as long as with --num-ranks {machine.count}, and more memory",
    )


def check_resume(config: TrainConfig, checked: CheckedRun) -> Checkpoint | None:
    """The checkpoint that a start would continue from, checked against the configuration. Raises UserError."""
    folder = config.run.output_dir
    holds_run = check_run_folder(config)
    named = config.checkpoint.resume
    if holds_run and config.run.force:
        if not isinstance(named, str) and folder.resolve() in named.resolve().parents:
            raise UserError(
                f"checkpoint.resume = {named} lies in run.output_dir {folder}, which run.force deletes; "
                "leave out --force to continue there, or name another run.output_dir"
            )
        if isinstance(named, str):
            return None
    checkpoint = find_resume(config.checkpoint, folder)
    if checkpoint is not None:
        check_continuable(checkpoint, config, checked.plan, checked.student_config)
        check_data(checkpoint, checked)
    return checkpoint


def check_continuable(checkpoint: Checkpoint, config: TrainConfig, plan: CurriculumPlan, student_config: Any) -> None:
    """Refuse a checkpoint of other pinned settings, of an unknown version, or behind the end. Raises ResumeError."""
    check_pinned(checkpoint, pinned_values(config))
    check_student(checkpoint, student_config)
    checkpoint.state()  # refuses what another version has written
    if checkpoint.step > plan.total_steps:
        raise ResumeError(
            f"{checkpoint.folder} is at step {checkpoint.step}, behind the end of the run at {plan.total_steps}; "
            "raise run.max_steps or name an earlier checkpoint"
        )


def check_data(checkpoint: Checkpoint, checked: CheckedRun) -> None:
    """Refuse a checkpoint that was trained on other stores or in another order. Raises ResumeError."""
    with Loader(checked.plan, checked.stores.sources) as loader:
        try:
            loader.load_state_dict(checkpoint.manifest["data"])
        except StoreError as error:
            raise ResumeError(f"{checkpoint.folder} was trained on other data: {error}") from error
