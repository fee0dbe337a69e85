"""`potstill plan`: what a dump and a student run will cost, before they are started; and what they did cost, after.

Costs come from the models' own shapes (counted on torch's meta device, no weights), a table of GPUs and a utilisation,
and no plan is faster than the host can select, encode and read (`plan_limits`). `calibrate` replaces all of it by what
a short real dump does on this machine.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from potstill.common.config import StrictModel
from potstill.common.errors import UserError
from potstill.common.exit_codes import DONE
from potstill.common.options import add_config_options, read_config
from potstill.common.progress import format_seconds
from potstill.launch.calibrate import Measured, calibrate
from potstill.launch.command import Command
from potstill.launch.model_costs import ModelCosts, model_costs
from potstill.launch.plan_limits import (
    COUNT_FORMS,
    CPU,
    GPUS,
    LOADER_TOKENS,
    device,
    format_hours,
    format_size,
    fp8_speed,
    host_tokens_per_second,
    read_count,
    start_seconds,
)
from potstill.launch.plan_online import (
    LEFT_OUT,
    PRICE_OF_TB_MONTH,
    OnlinePlan,
    Prices,
    gpus_that_hold,
    online_plan,
)
from potstill.launch.plan_online import PRICE_SOURCE as RENT_SOURCE
from potstill.launch.plan_units import (
    PRICE_OF_1000_GETS,
    PRICE_OF_1000_PUTS,
    PRICE_SOURCE,
    UnitPlan,
    compare_units,
    recommend_unit,
    unit_rows,
)
from potstill.teacher_dump.config import DumpConfig, PlaceText, SelectionConfig, WalkConfig

# Bytes per stored entry (id planes and value gaps after zstd) and of all side columns per token.
_ENTRY_BYTES_SMALL, _ENTRY_BYTES_LARGE, _SIDE_BYTES, _DRAW_BYTES = 1.97, 2.03, 4.0, 1.8
# Mean entries of top-p 0.95 at 2.1 nats of teacher entropy, and how they grow with it.
_ENTRIES_AT, _ENTROPY_AT, _ENTRIES_GROWTH = 42.0, 2.1, 1.13
_POWER_GROWTH = 2.1
_BACKWARD = 3.0  # a training step costs three forward passes


Tokens = Annotated[int | str | None, BeforeValidator(read_count)]


class PlanConfig(StrictModel):
    """What to plan for."""

    teacher: PlaceText = Field(description="Model whose configuration is read: folder or hub id")
    tokens: Tokens = Field(
        default=None,
        description=f"Tokens to dump: a number ({COUNT_FORMS}) or a tokens store; null takes the store of --calibrate",
    )
    row_length: int = Field(default=4096, ge=2, description="Tokens per row; a store named as tokens has its own")
    selection: SelectionConfig = Field(
        default_factory=lambda: SelectionConfig.model_validate({}), description="As in the dump"
    )
    num_temperatures: int = Field(default=0, ge=0, le=16, description="Temperatures besides 1 whose tails are stored")
    teacher_entropy: float = Field(default=2.1, gt=0, lt=20, description="Mean entropy in nats; better: calibrate")
    gpu: str = Field(default="h100", description=f"One of {', '.join(GPUS)}; cpu: this machine without a GPU, measured")
    num_gpus: int = Field(default=1, ge=1, description="GPUs, each a worker of the dump")
    dump_utilisation: float = Field(
        default=0.45, gt=0, le=1, description="Share of the GPU's speed that a dump reaches"
    )
    batch_rows: int = Field(default=8, ge=1, description="Rows per forward pass of a calibration")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(default="auto", description="As in the dump")
    student: PlaceText | None = Field(default=None, description="Student model, to plan its run as well")
    student_tokens: Tokens = Field(default=None, description="Tokens the student sees; null: those of the dump")
    student_tokens_per_second: float | None = Field(
        default=None, gt=0, description="Measured over all GPUs (a run's metrics tell it), instead of the next key"
    )
    train_utilisation: float = Field(
        default=0.4, gt=0, le=1, description="Share of the GPU's speed that training reaches"
    )

    price_per_1000_puts: float = Field(
        default=PRICE_OF_1000_PUTS, ge=0, description=f"Of PUT and LIST on the object store ({PRICE_SOURCE})"
    )
    price_per_1000_gets: float = Field(
        default=PRICE_OF_1000_GETS, ge=0, description=f"Of GET and HEAD there ({PRICE_SOURCE})"
    )
    price_per_tb_month: float = Field(
        default=PRICE_OF_TB_MONTH, ge=0, description=f"Of a terabyte kept for a month ({RENT_SOURCE})"
    )
    store_months: float = Field(default=1.0, ge=0, description="Months that the store is kept")
    price_per_gpu_hour: float | None = Field(
        default=None, gt=0, description="USD; null compares online and offline in GPU hours alone"
    )

    @model_validator(mode="after")
    def _number(self) -> Self:
        if isinstance(self.student_tokens, str):
            raise ValueError(f"student_tokens {self.student_tokens!r} is no number; write it as in {COUNT_FORMS}")
        return self


@dataclass(frozen=True)
class Plan:
    """Figures of a dump, and of a student's run if one was asked for; `format` shows them."""

    dump_seconds: float
    startup_seconds: float  # of each worker, a part of dump_seconds
    dump_worker_seconds: float  # over all workers, without their starts
    dump_gpu_hours: float
    dump_bytes: float
    bytes_per_token: float
    dump_write_bytes_per_second: float
    teacher_memory_bytes: float
    student_seconds: float | None
    student_gpu_hours: float | None
    student_read_bytes_per_second: float | None
    dump_limit: str = "measured on this machine"  # what ends the dump's speed
    student_limit: str | None = None
    device: str = "GPU"
    notes: tuple[str, ...] = ()
    unit: UnitPlan | None = None  # that the tokens store should have
    unit_table: tuple[tuple[str, str], ...] = ()
    teacher: str = ""  # its size in words
    online: OnlinePlan | None = None  # the other way; None without a student

    def rows(self) -> list[tuple[str, str]]:
        """What and how much, as text."""
        rows = [
            (
                "dump, wall time",
                f"{format_seconds(self.dump_seconds)} ({format_seconds(self.startup_seconds)} to start)",
            ),
            (f"dump, {self.device} hours", format_hours(self.dump_gpu_hours * 3600)),
            ("dump, limited by", self.dump_limit),
            ("store", f"{format_size(self.dump_bytes)} ({self.bytes_per_token:.1f} B/token)"),
            ("dump writes", f"{format_size(self.dump_write_bytes_per_second)}/s over all workers"),
            ("teacher weights", f"{format_size(self.teacher_memory_bytes)} ({self.teacher})"),
        ]
        if self.student_seconds is not None and self.student_gpu_hours is not None:
            rows += [
                ("student, wall time", format_seconds(self.student_seconds)),
                (f"student, {self.device} hours", format_hours(self.student_gpu_hours * 3600)),
                ("student, limited by", self.student_limit or "-"),
                ("student reads", f"{format_size(self.student_read_bytes_per_second or 0)}/s over all ranks"),
            ]
        return [*rows, *([LEFT_OUT] if self.online is None else self.online.rows()), *self.unit_table]

    def format(self) -> str:
        """A table and notes for a person."""
        rows = self.rows()
        width = max(len(what) for what, _ in rows)
        return "\n".join([*(f"{what:<{width}}  {figure}" for what, figure in rows), *self.notes])


def store_bytes_per_token(
    selection: SelectionConfig, *, vocab_size: int, entropy: float, num_temperatures: int
) -> float:
    """Expected bytes per token of a targets store at this mean teacher entropy (nats)."""
    side = _SIDE_BYTES + num_temperatures
    entries = expected_entries(selection, vocab_size=vocab_size, entropy=entropy)
    if selection.mode == "sample":
        return _DRAW_BYTES * entries + side
    return (_ENTRY_BYTES_SMALL if vocab_size <= 1 << 16 else _ENTRY_BYTES_LARGE) * entries + side


def expected_entries(selection: SelectionConfig, *, vocab_size: int, entropy: float) -> float:
    """Expected entries per token at this mean teacher entropy (nats)."""
    if selection.mode == "sample":
        # Distinct ids of n draws grow slower than n: about 13 of 50 at 2.1 nats, 5 of 12.
        distinct = 13.0 * (selection.num_draws / 50) ** 0.65 * entropy / _ENTROPY_AT
        # A flatter proposal touches more ids: 32, 18, 11 and 7.5 at powers 0.5, 0.8, 1 and 1.2 (benchmarks.proposals).
        distinct *= math.exp(_POWER_GROWTH * (1.0 - selection.power))
        return min(selection.num_draws, distinct)
    entries = float(min(selection.k, vocab_size))
    if selection.mode == "top_p_k":
        at_95 = _ENTRIES_AT * math.exp(_ENTRIES_GROWTH * (entropy - _ENTROPY_AT))
        # Entries needed grow about with a power of the mass that is left out (31, 42, 74 at .90, .95, .99).
        entries = min(entries, max(1.0, at_95 * ((1 - min(selection.p, 0.9999)) / 0.05) ** -0.4))
    return entries


def with_rows(config: PlanConfig, store: str | None) -> PlanConfig:
    """`tokens` as a number, and the row length with it, where they are those of a store.

    `store` is taken where `tokens` says nothing. UserError when there is neither, or no tokens store of that name, or
    another row length was asked for.
    """
    from potstill.storage import StoreError, StoreReader

    if isinstance(config.tokens, int):
        return config
    place = store if config.tokens is None else config.tokens
    if place is None:
        raise UserError(
            f"tokens: say how many are to be dumped (--tokens {COUNT_FORMS.split(', ')[-1]}), or name a tokens store"
        )
    try:
        reader = StoreReader(place)
    except StoreError as error:
        raise UserError(f"tokens {place!r} is neither a number ({COUNT_FORMS}) nor a tokens store: {error}") from error
    length = reader.spec.row_length
    if reader.spec.kind != "tokens":
        raise UserError(f"tokens {place!r} is a store of {reader.spec.kind}, expected a tokens store made by prepare")
    if "row_length" in config.model_fields_set and config.row_length != length:
        raise UserError(f"row_length {config.row_length}: the rows of {place} have {length} tokens; leave it out")
    return config.model_copy(update={"tokens": reader.num_tokens, "row_length": length})


def make_plan(config: PlanConfig, *, measured: Measured | None = None) -> Plan:
    """Work out a plan; `measured` (of a worker on this machine) replaces the GPU table for the dump."""
    config = with_rows(config, None)
    assert isinstance(config.tokens, int)
    peak, memory = device(config.gpu)
    teacher = model_costs(config.teacher, row_length=config.row_length)
    weights = 4.0 * teacher.parameters if config.gpu in CPU else teacher.weight_bytes
    forward = peak / teacher.flops_at(fp8_speed(config.gpu)) * config.dump_utilisation
    if measured is not None:
        forward = measured.tokens_per_second
        rate, startup, per_token = measured.tokens_per_second, measured.startup_seconds, measured.bytes_per_token
        limit = "measured on this machine"
    else:
        rate, limit = _dump_rate(config, forward, vocab_size=teacher.vocab_size)
        startup = start_seconds(weights)
        per_token = store_bytes_per_token(
            config.selection,
            vocab_size=teacher.vocab_size,
            entropy=config.teacher_entropy,
            num_temperatures=config.num_temperatures,
        )
    seconds = config.tokens / (rate * config.num_gpus) + startup
    unit = recommend_unit(
        num_tokens=config.tokens,
        row_length=config.row_length,
        bytes_per_token=per_token,
        tokens_per_second=rate,
        num_workers=config.num_gpus,
    )
    prices = {"per_1000_puts": config.price_per_1000_puts, "per_1000_gets": config.price_per_1000_gets}
    student = _student_rates(config, peak)
    student_tokens = config.student_tokens or config.tokens
    assert isinstance(student_tokens, int)
    student_seconds = None if student is None else student_tokens / student.rate
    plan = Plan(
        dump_seconds=seconds,
        startup_seconds=startup,
        dump_worker_seconds=config.tokens / rate,
        dump_gpu_hours=seconds * config.num_gpus / 3600,
        dump_bytes=config.tokens * per_token,
        bytes_per_token=per_token,
        dump_write_bytes_per_second=rate * config.num_gpus * per_token,
        teacher_memory_bytes=weights,
        student_seconds=student_seconds,
        student_gpu_hours=None if student_seconds is None else student_seconds * config.num_gpus / 3600,
        student_read_bytes_per_second=None if student is None else student.rate * per_token,
        dump_limit=limit,
        student_limit=None if student is None else student.limit,
        device="machine" if config.gpu in CPU else "GPU",
        unit=unit,
        unit_table=tuple(unit_rows(unit, num_workers=config.num_gpus, **prices)),
        teacher=teacher.describe(),
    )
    notes = tuple(_notes(config, teacher, weights, memory))
    if student is None:
        return replace(plan, notes=notes)
    online = _online(config, plan, student, tokens=student_tokens, forward=forward, memory=memory)
    return replace(plan, online=online, notes=(*notes, *online.notes()))


def _online(
    config: PlanConfig, plan: Plan, student: _StudentRates, *, tokens: int, forward: float, memory: float
) -> OnlinePlan:
    """The other way, with the same rates; `forward` is the teacher's of one GPU."""
    assert isinstance(config.tokens, int)
    least = gpus_that_hold(
        teacher_bytes=plan.teacher_memory_bytes, student_parameters=student.costs.parameters, memory=memory
    )
    return online_plan(
        student_tokens=tokens,
        dump_tokens=config.tokens,
        student_rate=student.rate,
        step_rate=student.step_rate,
        teacher_rate=forward * config.num_gpus,
        startup_seconds=plan.startup_seconds,
        num_gpus=config.num_gpus,
        dump_hours=plan.dump_gpu_hours,
        store_bytes=plan.dump_bytes,
        device=plan.device,
        least_gpus=None if config.gpu in CPU else least,
        prices=Prices(
            gpu_hour=config.price_per_gpu_hour, tb_month=config.price_per_tb_month, months=config.store_months
        ),
    )


def rows_per_unit(store: str) -> int:
    """Of a store that stands there."""
    from potstill.storage import read_spec

    return read_spec(store).rows_per_unit


def _dump_rate(config: PlanConfig, forward: float, *, vocab_size: int) -> tuple[float, str]:
    """Tokens per second of one worker, and what ends it; `forward` is that of the model's forward pass."""
    threads = WalkConfig.model_fields["finish_threads"].default
    entries = expected_entries(config.selection, vocab_size=vocab_size, entropy=config.teacher_entropy)
    host = host_tokens_per_second(entries, threads=threads)
    if forward <= host:
        return forward, f"the teacher's forward pass ({forward:,.0f} tokens/s a worker)"
    return host, (
        f"selecting and encoding on the host ({host:,.0f} tokens/s a worker with finish_threads {threads}; the forward "
        f"pass alone would do {forward:,.0f})"
    )


@dataclass(frozen=True)
class _StudentRates:
    """Tokens per second over all GPUs: from a store, with what ends it, and of the step alone."""

    rate: float
    limit: str
    step_rate: float
    costs: ModelCosts


def _student_rates(config: PlanConfig, peak: float) -> _StudentRates | None:
    """None without a student."""
    if config.student is None:
        return None
    costs = model_costs(config.student, row_length=config.row_length, what="student")
    given = config.student_tokens_per_second
    if given is not None:
        return _StudentRates(given, "student_tokens_per_second, as given", given, costs)
    steps = peak * config.train_utilisation * config.num_gpus / (_BACKWARD * costs.forward_flops)
    loading = LOADER_TOKENS * config.num_gpus
    limit = f"the student's step ({steps:,.0f} tokens/s over all ranks)"
    if steps > loading:
        limit = f"reading rows ({loading:,.0f} tokens/s over all ranks; the step alone would do {steps:,.0f})"
    return _StudentRates(min(steps, loading), limit, steps, costs)


def _notes(config: PlanConfig, teacher: ModelCosts, weights: float, memory: float) -> Iterator[str]:
    quantised = teacher.quantised
    if weights > 0.9 * memory:
        group = math.ceil(weights / (0.7 * memory))
        # Heads are shared out evenly, so that a group is a power of two; ZeRO-3 shards weights of 16 bits alone.
        zero3 = "" if quantised is not None else f", or engine zero3, groups of {group} GPUs or more"
        yield (
            f"the teacher's weights ({weights / 1e9:.0f} GB) do not fit a {config.gpu}: engine vllm with "
            f"tensor_parallel {1 << (group - 1).bit_length()} or more{zero3}"
        )
    if quantised is not None and not quantised.known:
        yield (
            f"how many bits the teacher's quantisation ({quantised.method}) takes is not known here: its weights are "
            "counted as 16; look at the size of its files"
        )
    if quantised is not None and quantised.fp8 and fp8_speed(config.gpu) == 1:
        yield f"{config.gpu} does not multiply FP8, so the teacher runs at the speed of 16 bits there"
    if teacher.context is not None and teacher.context < config.row_length:
        yield (
            f"the teacher reads at most {teacher.context} positions, so dump refuses rows of {config.row_length}: "
            f"prepare and plan with --row-length {teacher.context} or less"
        )


def compare(plan: Plan, store: str) -> list[tuple[str, str, str, str]]:
    """What, planned, actual and actual / planned, of a sealed targets store. Raises StoreError when it is not one.

    Seconds are those of all workers added up, from the first batch of each to its last: the same for any number of
    workers, and undisturbed by pauses between them. Wall time is that when any worker was at work.
    """
    from potstill.storage import StoreReader, store_status

    reader, status = StoreReader(store), store_status(store)
    assert reader.manifest is not None
    num_bytes = float(reader.manifest.num_bytes)
    rows = [
        _compared("bytes per token", plan.bytes_per_token, num_bytes / max(1, reader.num_tokens), "{:.2f}".format),
        _compared("store, bytes", plan.dump_bytes, num_bytes, "{:,.0f}".format),
    ]
    if status.worker_seconds is not None:
        rows.append(_compared("worker seconds", plan.dump_worker_seconds, status.worker_seconds, "{:,.1f}".format))
    if status.active_seconds is not None:
        planned = plan.dump_seconds - plan.startup_seconds
        rows.append(_compared("wall time", planned, status.active_seconds, format_seconds))
    return rows


def _compared(what: str, planned: float, actual: float, form: Callable[[float], str]) -> tuple[str, str, str, str]:
    return what, form(planned), form(actual), f"{actual / planned:.3f}" if planned else "-"


def format_comparison(rows: Sequence[tuple[str, str, str, str]]) -> str:
    """Four columns for a person."""
    table = [("", "planned", "actual", "actual / planned"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
    return "\n".join(line.rstrip() for line in lines)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibrate", metavar="TOKENS_STORE", help="measure speed and size by a short real dump of rows of this store"
    )
    parser.add_argument(
        "--calibrate-rows", type=int, metavar="N", help="rows of it (as many as hold 131,072 tokens a worker)"
    )
    parser.add_argument(
        "--calibrate-workers",
        type=int,
        default=1,
        metavar="N",
        help="run N workers at once for it, as many as will share a machine (1)",
    )
    parser.add_argument("--beside", metavar="TARGETS_STORE", help="show a store's actual figures beside the plan")
    flags = {"--mode": "selection.mode", "--k": "selection.k", "--p": "selection.p"}
    add_config_options(parser, PlanConfig, flags=flags)


def _run(arguments: argparse.Namespace) -> int:
    config = read_config(PlanConfig, arguments)
    measured = None
    if arguments.calibrate:
        config = with_rows(config, arguments.calibrate)
        teacher = {"model": config.teacher, "batch_rows": config.batch_rows, "dtype": config.dtype}
        settings = {"tokens": arguments.calibrate, "output": "-", "teacher": teacher, "selection": config.selection}
        dump = DumpConfig.model_validate(settings)
        with tempfile.TemporaryDirectory(prefix="potstill_plan_") as folder:
            measured = calibrate(
                dump,
                num_rows=arguments.calibrate_rows,
                folder=Path(folder),
                num_workers=arguments.calibrate_workers,
            )
        beside = f" beside {measured.num_workers - 1} more" if measured.num_workers > 1 else ""
        print(
            f"measured on this machine, one worker{beside}: {measured.tokens_per_second:,.0f} tokens/s, "
            f"{measured.bytes_per_token:.1f} B/token, {measured.startup_seconds:.1f}s to start"
        )
    plan = make_plan(config, measured=measured)
    print(plan.format())
    store = arguments.calibrate or (config.tokens if isinstance(config.tokens, str) else None)
    said = None if store is None or plan.unit is None else compare_units(store, rows_per_unit(store), plan.unit)
    if said is not None:
        print(said)
    if arguments.beside:
        print(format_comparison(compare(plan, arguments.beside)))
    return DONE


PLAN = Command(
    name="plan",
    summary="what a dump and a student run will cost: bytes, GPU hours, wall time, rates",
    description="Work out, from the models' configurations, what a dump and a student's run will cost, before they are "
    "started. --calibrate measures instead of assuming; --beside shows afterwards what a dump did cost.",
    examples=(
        "potstill plan --teacher models/teacher --tokens 100B --gpu h100 --num-gpus 64",
        "potstill plan --teacher models/teacher --tokens data/train --gpu cpu",
        "potstill plan --teacher models/teacher --calibrate data/train --beside data/targets",
    ),
    add_arguments=_arguments,
    run=_run,
)
