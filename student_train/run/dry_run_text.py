"""The figures of a dry run for a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from potstill.common.sizes import format_bytes
from potstill.student_train.run.dry_run import DryRun, StageFigures

DIGEST_SHOWN = 12  # hexadecimal digits


def format_dry_run(run: DryRun) -> str:
    """Sections with a heading each, in the order in which a start would come to them."""
    sections = {
        f"dry run of {run.output_dir}: nothing was started, nothing was written": _start(run),
        "stores": _stores(run),
        "steps": _steps(run),
        "stages": (line for stage in run.stages for line in _stage(stage, run)),
        f"memory on one rank (ZeRO {run.zero_stage}, {run.num_ranks} rank(s), {run.dtype})": _memory(run),
    }
    lines = [line for title, body in sections.items() for line in (title, *(f"  {line}" for line in body))]
    return "\n".join([*lines, *(f"note: {note}" for note in run.notes)])


def _start(run: DryRun) -> Iterator[str]:
    if run.resume is None:
        yield "starts at step 0"
    else:
        how = ", converted for this number of ranks" if run.resume_converts else ""
        yield f"resumes at step {run.first_step} from {run.resume}{how}"
    yield f"this machine: {run.device_count} {'GPU(s)' if run.device == 'cuda' else 'core(s), no GPU'}"


def _stores(run: DryRun) -> Iterator[str]:
    rows = [
        (
            store.key,
            f"{store.rows:,} rows",
            f"{store.tokens:,} tokens",
            format_bytes(store.bytes),
            f"digest {store.digest[:DIGEST_SHOWN]}",
            store.path,
        )
        for store in run.stores
    ]
    yield from _columns(rows, right=(1, 2, 3))
    if run.vocabulary is not None:
        yield f"vocabulary: {run.vocabulary}"
    reads = {store.key: store.read_bytes for store in run.stores if store.read_bytes is not None}
    about = "about " if run.reads_sampled else ""
    parts = ", ".join(f"{key} {format_bytes(count)}" for key, count in reads.items())
    yield f"read in training, by all ranks: {about}{format_bytes(sum(reads.values()))} ({parts});"
    yield "a row is read with the record batch that holds it, once for each time it is trained on"


def _steps(run: DryRun) -> Iterator[str]:
    left = run.total_steps - run.first_step
    done = f" ({run.first_step:,} of {run.total_steps:,} are done)" if run.first_step else ""
    yield f"{left:,} steps{done} of {run.global_batch_rows:,} rows; {left * run.global_batch_rows:,} rows"
    where = "data.tokens" if len(run.sources) == 1 else "data.sources"
    yield f"about {run.tokens:,} tokens, {run.passes:.3g} passes over the {run.num_rows:,} rows of {where}"
    for source in run.sources if len(run.sources) > 1 else ():
        passes = source.rows / max(source.num_rows, 1)
        yield (
            f"{source.name}: {source.rows:,} rows, about {source.tokens:,} tokens, {passes:.3g} passes over its "
            f"{source.num_rows:,} rows"
        )
    yield (
        f"{run.global_batch_rows:,} rows = {run.micro_batch_rows} per forward x {run.accumulation} accumulation x "
        f"{run.num_ranks} rank(s); up to {run.global_batch_rows * run.row_length:,} tokens a step"
    )


def _stage(stage: StageFigures, run: DryRun) -> Iterator[str]:
    done = ", done" if stage.end_step <= run.first_step else ""
    anew = ", the optimizer starts anew" if stage.restarts_optimizer else ""
    yield f"{stage.name}: steps {stage.first_step:,} to {stage.end_step - 1:,}{done}{anew}"
    if stage.targets is None:
        yield "  labels only"
    else:
        targets = f"{stage.targets}, " if not stage.clock else "by the clock below, "
        yield (
            f"  targets {targets}{stage.divergence} with missing mass {stage.missing_mass}; "
            f"alpha {_curve(stage.alpha)}, temperature {_curve(stage.temperature)}"
            + (", labels fully where KD is off" if stage.off_kd == "ce" else "")
        )
    for first, store, teacher_step in stage.clock:
        yield f"  from step {first:,}: {store}, step {teacher_step:,} of the teacher"
    if stage.next_on is not None:
        yield f"  then the next store on {stage.next_on}, decided during the run"
    if len(run.sources) > 1:
        yield f"  mix of rows: {', '.join(f'{name} {100 * share:.4g} %' for name, share in stage.mix.items())}"
    rows = "all rows" if stage.row_share == (1.0, 1.0) else f"rows: share {_curve(stage.row_share)} of all"
    tokens = "all positions"
    if stage.token_policy is not None:
        tokens = f"positions by {stage.token_policy}, share {_curve(stage.token_share)}"
    if stage.weights is not None:
        tokens += f"; {stage.weights}"
    yield f"  {rows}; {tokens}; reads {', '.join(('tokens', *stage.reads))}"


def _memory(run: DryRun) -> Iterator[str]:
    parts = {part: size for part, size in run.memory_bytes.items() if size}
    rows = [(part, format_bytes(size)) for part, size in parts.items()]
    yield from _columns([*rows, ("sum", format_bytes(sum(parts.values())))], right=(1,))
    yield f"{run.num_parameters:,} parameters; not counted: activations, which grow with the tokens of a forward"
    yield "(model.gradient_checkpointing keeps them small), the loader's batches, and what torch itself takes"


def _curve(ends: tuple[float, float]) -> str:
    first, last = (f"{value:.4g}" for value in ends)
    return first if first == last else f"{first} -> {last}"


def _columns(rows: Sequence[tuple[str, ...]], *, right: tuple[int, ...]) -> Iterator[str]:
    widths = [max(len(row[number]) for row in rows) for number in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
