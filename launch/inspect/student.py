"""What a run adds to the page of `potstill inspect --html`: what a step keeps of each row, and the student's loss."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from potstill.common.errors import UserError
from potstill.launch.inspect.data import RowExtras

if TYPE_CHECKING:
    from potstill.storage import StoreReader
    from potstill.student_train.evaluation.row_figures import CurriculumStep, KeptFigures, RowFigures
    from potstill.student_train.hf_export.weights import Source
    from potstill.student_train.run.checkpoint import Checkpoint


@dataclass(frozen=True)
class StudentPart:
    """Extras of each row, and names and values that say where they come from."""

    extras: list[RowExtras]
    about: list[list[str]]


def student_part(arguments: argparse.Namespace, tokens: StoreReader, rows: Sequence[int]) -> StudentPart | None:
    """What the four flags ask for; None without them. Raises UserError."""
    if arguments.run_folder is not None and arguments.config is not None:
        raise UserError("--run has its own configuration; give one of --run and --config")
    if arguments.step is not None and arguments.run_folder is None and arguments.config is None:
        raise UserError("--step is a step of a run; add --run RUN or --config FILE")
    if arguments.run_folder is None and arguments.config is None and arguments.model is None:
        return None
    step = _step(arguments.step)
    from potstill.common.config import load_config
    from potstill.student_train.config.train import TrainConfig
    from potstill.student_train.evaluation.folder import in_model_vocabulary, model_vocabulary, tokenizer_candidates
    from potstill.student_train.evaluation.row_figures import curriculum_step, load_student, row_figures
    from potstill.student_train.hf_export.weights import find_source
    from potstill.student_train.run.checkpoint import list_checkpoints
    from potstill.student_train.run.run_folder import CONFIG_FILE, read_run_config

    config = None
    if arguments.run_folder is not None:
        config = read_run_config(arguments.run_folder)
    elif arguments.config is not None:
        config = load_config(TrainConfig, arguments.config)
    saved = [] if arguments.run_folder is None else list_checkpoints(arguments.run_folder)
    if arguments.run_folder is not None and arguments.model is None and not saved:
        raise UserError(
            f"run {arguments.run_folder} holds no whole checkpoint yet, so there is no student; let it reach its first "
            f"save, or look at its curriculum alone with --config {arguments.run_folder / CONFIG_FILE}"
        )
    place = arguments.run_folder if arguments.model is None else arguments.model
    source = None if place is None else find_source(place)
    at = None
    if config is not None:
        at = curriculum_step(config, tokens, step=step, default=_last_step(source, saved), checkpoints=saved)
    if at is not None:
        tokens = at.stores.sources[at.source].tokens  # the same rows, in the ids of the run
    elif source is not None and (vocabulary := model_vocabulary(source, None)) is not None:
        beside = tokenizer_candidates(source, tokens.url if "://" in tokens.url else Path(tokens.url), tokens)
        tokens, _ = in_model_vocabulary(vocabulary, tokens, candidates=beside)
    student = None if source is None else load_student(source, tokens)
    found = row_figures(rows, tokens, at=at, student=student)
    return StudentPart([_extras(one, at, source) for one in found], _about(arguments, at, source))


def _step(text: str | None) -> int | float | None:
    if text is None:
        return None
    try:
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    except ValueError as error:
        raise UserError(f"--step {text}: expected a number of a step, or a share of the run such as 0.5") from error


def _last_step(source: Source | None, saved: Sequence[Checkpoint]) -> int:
    """The last step that the student was trained on, or else the run's newest checkpoint; 0 without a run."""
    if not saved:
        return 0
    own = None if source is None else source.checkpoint
    return max((own or saved[-1]).step - 1, 0)


def _about(arguments: argparse.Namespace, at: CurriculumStep | None, source: Source | None) -> list[list[str]]:
    lines = []
    if at is not None:
        place = arguments.run_folder or arguments.config
        names = ", ".join(sorted(at.plan.joined(at.step))) or "none"
        lines.append([f"curriculum of {place}", f"step {at.step}, which reads the stores: {names}"])
    if source is not None:
        lines.append(["student", _student_name(source)])
    return lines


def _student_name(source: Source) -> str:
    if source.checkpoint is None:
        return source.folder.name
    return f"{source.run.name} after {source.checkpoint.step} steps"


def _extras(found: RowFigures, at: CurriculumStep | None, source: Source | None) -> RowExtras:
    extra = RowExtras()
    if found.student is not None:
        extra.figures |= {"st_loss": found.student.loss, "st_entropy": found.student.entropy}
    if found.kept is None or at is None:
        return extra
    extra.figures["w_loss"] = found.kept.token_weights
    if found.kept.kd_weights is not None:
        extra.figures["w_kd"] = found.kept.kd_weights
    extra.left_out = not found.kept.in_pool
    extra.note = kept_note(found.kept, at, student=None if source is None else _student_name(source))
    return extra


def kept_note(kept: KeptFigures, at: CurriculumStep, *, student: str | None) -> str:
    """One line: step, stage, whether the row is in the pool, and how much of its tokens is kept."""
    span = at.plan.segment(at.step).span
    size, total = at.pool_size, at.stores.num_rows
    if not kept.in_pool:
        pool = f"the row is not in the pool ({size:,} of {total:,} rows), nothing of it is trained on."
    elif size == total:
        pool = "the row is in the pool (all rows)."
    else:
        pool = f"the row is in the pool ({size:,} of {total:,} rows)."
    choice = at.objective.tokens
    said = f"Step {at.step:,} of {at.plan.total_steps:,}, stage {span.name}: {pool} {_share_text(kept, at)}"
    return said + (f"; chosen by {student}." if choice is not None and choice.uses_student else ".")


def _share_text(kept: KeptFigures, at: CurriculumStep) -> str:

    choice = at.objective.tokens
    on_kd = choice is not None and choice.selector.applies_to == "kd"
    weights = kept.kd_weights if on_kd and kept.kd_weights is not None else kept.token_weights
    weights = weights[kept.labelled]
    if not len(weights):
        return "It has no token to predict"
    what = "distillation" if on_kd else "the loss"
    if choice is not None and choice.selector.entry.kind == "weight":
        low, high = (float(np.quantile(weights, end)) for end in (0.0, 1.0))
        said = f"Each token weighs {low:.3g} to {high:.3g} in {what} ({choice.selector.policy})"
    else:
        floor = 0.0 if choice is None else choice.floor
        share = float((weights > floor).mean())
        said = f"Of its tokens {100 * share:.1f} % {'are' if kept.in_pool else 'would be'} kept in {what}"
        said += f" ({choice.selector.policy})" if choice is not None else ""
        said += f", the others weigh {floor:.3g}" if floor > 0 and share < 1 else ""
    return said + (", and the labels of all" if on_kd and at.objective.settings.label_weight > 0 else "")
