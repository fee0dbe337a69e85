"""What a start would do, without starting it: stores, steps, batch, stages, bytes to read, memory by part.

The model is built of meta tensors, which have shapes and no memory. The figures of memory are those of the ZeRO paper
(Rajbhandari et al. 2020, arXiv 1910.02054, section 3) for AdamW, with what DeepSpeed 0.19 adds (its reduce bucket) and
the chunk of logits of our loss. Activations are not estimated: they depend on the attention that is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from potstill.common.errors import UserError
from potstill.kernels.loss import logits_chunk_bytes
from potstill.storage import Loader, SourceRows, StoreReader
from potstill.student_train.config.clocks import SWITCHES
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.curriculum.plan import CurriculumPlan
from potstill.student_train.curriculum.schedules import scalar_value
from potstill.student_train.curriculum.segments import StageSpan
from potstill.student_train.curriculum.step_objective import stage_value, step_objective
from potstill.student_train.data.stores import Stores
from potstill.student_train.data.vocabulary import tail_line
from potstill.student_train.model.parameters import DTYPES, count_parameters
from potstill.student_train.run.parameter_groups import hidden_matrices
from potstill.student_train.run.preflight import CheckedStart
from potstill.student_train.run.rescoring import rescoring_notes
from potstill.student_train.run.universal import needs_conversion

SAMPLED_ROWS = 50_000  # row ids looked up for the estimate of bytes; a run with fewer is counted whole
REDUCE_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default


@dataclass(frozen=True)
class StoreFigures:
    """One store that the run reads."""

    key: str
    path: str
    kind: str
    digest: str
    rows: int
    tokens: int
    bytes: int
    read_bytes: float | None  # over the steps to do, by all ranks; None for held-out stores


@dataclass(frozen=True)
class SourceFigures:
    """A source of rows: what it holds, and how many of its rows the steps to do draw."""

    name: str
    num_rows: int
    rows: int
    tokens: int  # of those rows, by the source's mean


@dataclass(frozen=True)
class StageFigures:
    """One stage: its steps [first, end) and what it does, each scalar at its first and last step."""

    name: str
    first_step: int
    end_step: int
    targets: str | None  # the first, where it has a clock
    clock: tuple[tuple[int, str, int], ...]  # first step, store and teacher step of each part; none without a clock
    next_on: str | None  # what the run decides by when to take the next store; None where that is known
    divergence: str
    missing_mass: str
    alpha: tuple[float, float]
    temperature: tuple[float, float]
    mix: Mapping[str, float]  # share of the rows by name of the source
    row_share: tuple[float, float]
    token_policy: str | None
    token_share: tuple[float, float]
    off_kd: str
    weights: str | None  # of rows and documents, in words
    restarts_optimizer: bool
    reads: tuple[str, ...]  # stores besides the tokens


@dataclass(frozen=True)
class DryRun:
    """What a start would do."""

    output_dir: str
    device: str
    device_count: int
    num_ranks: int
    zero_stage: int
    dtype: str
    resume: str | None  # the checkpoint it would continue from
    resume_converts: bool
    first_step: int
    total_steps: int
    global_batch_rows: int
    micro_batch_rows: int
    accumulation: int
    row_length: int
    num_rows: int
    num_parameters: int
    passes: float
    tokens: int
    sources: tuple[SourceFigures, ...]
    stores: tuple[StoreFigures, ...]
    reads_sampled: bool
    vocabulary: str | None  # the student's beside the teacher's, where it is another one
    stages: tuple[StageFigures, ...]
    memory_bytes: Mapping[str, int]  # per rank, by part
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All figures as plain values."""
        return asdict(self)


def dry_run(start: CheckedStart) -> DryRun:
    """The figures of a start that was checked. Raises UserError where the student cannot be built."""
    config, plan, stores = start.config, start.run.plan, start.run.stores
    hf = meta_student(config, start.run.student_config)
    first = 0 if start.checkpoint is None else start.checkpoint.step
    sampled = sampled_steps(plan, first)
    sources = tuple(
        SourceFigures(
            name=source.name,
            num_rows=source.tokens.num_rows,
            rows=rows,
            tokens=round(rows * source.tokens.num_tokens / max(source.tokens.num_rows, 1)),
        )
        for source, rows in zip(stores.sources, plan.rows_taken(first, plan.total_steps), strict=True)
    )
    head = hf.get_output_embeddings().weight.shape
    return DryRun(
        output_dir=str(config.run.output_dir),
        device=start.machine.device,
        device_count=start.machine.count,
        num_ranks=start.num_ranks,
        zero_stage=config.zero_stage,
        dtype=config.model.dtype,
        resume=None if start.checkpoint is None else str(start.checkpoint.folder),
        resume_converts=start.checkpoint is not None and needs_conversion(start.checkpoint, start.num_ranks),
        first_step=first,
        total_steps=plan.total_steps,
        global_batch_rows=plan.global_batch,
        micro_batch_rows=config.data.micro_batch_rows,
        accumulation=start.run.accumulation,
        row_length=stores.spec.row_length,
        num_rows=stores.num_rows,
        num_parameters=count_parameters(hf),
        passes=sum(source.rows for source in sources) / stores.num_rows,
        tokens=sum(source.tokens for source in sources),
        sources=sources,
        stores=store_figures(start, first, sampled),
        reads_sampled=len(sampled) < plan.total_steps - first,
        vocabulary=vocabulary_line(stores),
        stages=tuple(stage_figures(config, plan, span) for span in plan.spans),
        memory_bytes=memory_by_part(
            config,
            num_parameters=count_parameters(hf),
            num_muon=sum(p.numel() for p in hidden_matrices(hf)) if config.optimizer.kind == "muon" else 0,
            head=head,
            start=start,
            device=start.machine.device,
        ),
        notes=(*start.notes, *rescoring_notes(config, start.run, first_step=first)),
    )


def meta_student(config: TrainConfig, student_config: Any) -> Any:
    """The Hugging Face model on the meta device: shapes without memory."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                student_config, attn_implementation=config.model.attention, dtype=torch.float32
            )
    except (ValueError, ImportError) as error:
        raise UserError(
            f"the student cannot be built with model.attention {config.model.attention}: {error}"
        ) from error


def sampled_steps(plan: CurriculumPlan, first: int) -> list[int]:
    """Steps whose reads are looked up: all that are left, or so many evenly spread ones."""
    left = plan.total_steps - first
    count = min(left, max(8, SAMPLED_ROWS // plan.global_batch))
    return sorted({first + number * left // count for number in range(count)})


def store_figures(start: CheckedStart, first: int, steps: list[int]) -> tuple[StoreFigures, ...]:
    """Each store, with the bytes that all ranks read from it in the steps to do (estimated from `steps`)."""
    data, stores, plan = start.config.data, start.run.stores, start.run.plan
    rows_of = SourceRows(stores.sources)
    read = [dict.fromkeys(("tokens", *source.joined), 0.0) for source in stores.sources]
    loaders = [
        Loader(plan, stores.sources, rank=rank, world=start.num_ranks, num_threads=data.num_threads)
        for rank in range(start.num_ranks)
    ]
    for step in steps:
        names = plan.joined(step)
        parts = (part for loader in loaders for rows in loader.reads(step) for part in rows_of.split(rows))
        for number, _, rows in parts:
            source = stores.sources[number]
            read[number]["tokens"] += source.tokens.read_bytes(rows)
            for name in names & source.joined.keys():
                read[number][name] += source.joined[name].read_bytes(rows)
    scale = (plan.total_steps - first) / max(len(steps), 1)
    found = []
    for named, source, counted in zip(data.named_sources(), stores.sources, read, strict=True):
        tokens = _figures(f"{named.key}.tokens", named.config.tokens, source.tokens, counted["tokens"] * scale)
        found.append(tokens)
        for kind, group in (("targets", named.config.targets), ("scores", named.config.scores)):
            for name, path in group.items():
                key = f"{named.key}.{kind}.{name}"
                found.append(_figures(key, path, source.joined[name], counted[name] * scale))
    for key, place, reader in (
        ("data.heldout", data.heldout, stores.heldout),
        ("data.heldout_targets", data.heldout_targets, stores.heldout_targets),
    ):
        if reader is not None:
            found.append(_figures(key, place, reader, None))
    for named in data.named_sources():
        own = stores.source_heldout.get(named.name)
        if own is not None:
            found.append(_figures(f"{named.key}.heldout", named.config.heldout, own.tokens, None))
        if own is not None and own.targets is not None:
            found.append(_figures(f"{named.key}.heldout_targets", named.config.heldout_targets, own.targets, None))
    return tuple(found)


def vocabulary_line(stores: Stores) -> str | None:
    """What data.vocabulary does, and what a subset costs on some rows."""
    if stores.vocabulary is None:
        return None
    return ", ".join(filter(None, (stores.vocabulary.line(), tail_line(stores.vocabulary, stores.targets()))))


def _figures(key: str, path: Path | str | None, reader: StoreReader, read_bytes: float | None) -> StoreFigures:
    return StoreFigures(
        key=key,
        path=str(path),
        kind=reader.spec.kind,
        digest=reader.digest,
        rows=reader.num_rows,
        tokens=reader.num_tokens,
        bytes=reader.manifest.num_bytes,
        read_bytes=read_bytes,
    )


def stage_figures(config: TrainConfig, plan: CurriculumPlan, span: StageSpan) -> StageFigures:
    """What a stage does at its first and its last step."""
    last = span.end_step - 1
    begin, end = (step_objective(config.objective, span.stage, x) for x in (0.0, 1.0))
    divergence, missing_mass, temperature = (
        stage_value(config.objective, span.stage, name) for name in ("divergence", "missing_mass", "temperature")
    )
    selector, clock = span.stage.tokens, span.stage.targets_clock
    shares = [1.0 if at.tokens is None else at.tokens.share for at in (begin, end)]
    looked_at = {span.first_step, (span.first_step + last) // 2, last, *(part[0] for part in plan.clock_parts(span))}
    reads = frozenset().union(*(plan.joined(step) for step in looked_at))
    return StageFigures(
        name=span.name,
        first_step=span.first_step,
        end_step=span.end_step,
        targets=plan.targets(span.first_step),
        clock=plan.clock_parts(span),
        next_on=clock.switch_on if clock is not None and SWITCHES[clock.switch_on].decided else None,
        divergence=divergence,
        missing_mass=missing_mass,
        alpha=(begin.settings.alpha, end.settings.alpha),
        temperature=(scalar_value(temperature, 0.0), scalar_value(temperature, 1.0)),
        mix=plan.mix(span.first_step),
        row_share=(plan.row_share(span.first_step), plan.row_share(last)),
        token_policy=None if selector is None else selector.policy,
        token_share=(shares[0], shares[1]),
        off_kd=stage_value(config.objective, span.stage, "off_kd"),
        weights=None if span.stage.weights is None else span.stage.weights.describe(),
        restarts_optimizer=plan.restarts_optimizer(span.first_step),
        reads=tuple(sorted(reads)),
    )


def memory_by_part(
    config: TrainConfig,
    *,
    num_parameters: int,
    num_muon: int,
    head: tuple[int, int],
    start: CheckedStart,
    device: str,
) -> dict[str, int]:
    """Bytes on one rank by part. `num_muon`: parameters that Muon trains; `head`: [V, D] of the output projection.

    ZeRO 1 cuts master weights and optimizer over the ranks, 2 the gradients too, 3 the weights too; 0 nothing. With
    float32 and stage 0 the weights are the master weights. An optimizer that is offloaded lies in the host's memory.
    """
    stage, ranks = config.zero_stage, start.num_ranks
    width = DTYPES[config.model.dtype].itemsize
    first_cut = {"optimizer": 1, "gradients": 2, "weights": 3}
    share = {part: ranks if stage >= first else 1 for part, first in first_cut.items()}
    own_master = config.model.dtype != "float32" or stage > 0
    zero = config.deepspeed.get("zero_optimization", {})
    has_bucket = stage > 0 and zero.get("contiguous_gradients", True)
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET_ELEMENTS)) if has_bucket else 0
    num_tokens = config.data.micro_batch_rows * start.run.stores.spec.row_length
    vocab_size, hidden = head
    moments = 2 * num_parameters - num_muon
    optimizer = {"AdamW moments (float32)": -(-moments // share["optimizer"]) * 4}
    if num_muon:
        optimizer = {"Muon and AdamW moments (float32)": optimizer["AdamW moments (float32)"]}
        optimizer["Muon's gathered updates"] = num_muon * 2  # bfloat16
    return {
        "weights": -(-num_parameters // share["weights"]) * width,
        "master weights (float32)": -(-num_parameters // share["optimizer"]) * 4 if own_master else 0,
        **optimizer,
        "gradients": -(-num_parameters // share["gradients"]) * width,
        "DeepSpeed's reduce bucket": bucket * width,
        "head gradient of the loss (float32)": vocab_size * hidden * 4,
        "logits chunk of the loss": logits_chunk_bytes(
            num_tokens=num_tokens,
            vocab_size=vocab_size,
            dtype=DTYPES[config.model.dtype],
            device=torch.device(device),
            backend=config.model.loss_backend,
        ),
    }
