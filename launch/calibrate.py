"""What a short real dump does on this machine, as `potstill plan --calibrate` measures it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from potstill.common.errors import UserError
from potstill.common.processes import start, stop
from potstill.teacher_dump.config import DumpConfig

if TYPE_CHECKING:
    from potstill.storage import CommitRecord, StoreReader

_UNITS_PER_WORKER = 4  # the first of them warms the worker up and counts as its start
_TOKENS_PER_UNIT = 8192
# Long enough on a CPU (ten seconds and more a worker) that the pauses of a busy machine even out; a moment on a GPU.
_TOKENS_PER_WORKER = 1 << 17


@dataclass(frozen=True)
class Measured:
    """What a worker does on this machine, beside as many others as ran with it.

    `startup_seconds` is what a worker spends before its steady rate: imports, loading, the first unit's warming up.
    """

    tokens_per_second: float
    bytes_per_token: float
    startup_seconds: float
    num_workers: int = 1


def calibrate(dump: DumpConfig, *, num_rows: int | None = None, folder: Path, num_workers: int = 1) -> Measured:
    """Dump `num_rows` rows spread over `dump.tokens` into `folder`, and measure speed, bytes and start-up time.

    Without `num_rows` they are as many as hold 131,072 tokens a worker, or all there are.

    `num_workers` workers at once, each a process of its own with the settings of the real dump: on one machine they
    share cores and disk, so that two are not twice as fast as one. Nothing of `dump.output` is touched.
    Raises UserError when a worker fails, with the end of what it printed.
    """
    from potstill.storage import StoreReader, StoreWriter, seal_store

    source = StoreReader(dump.tokens)
    sample = _sample_store(
        source,
        num_rows=num_rows or -(-_TOKENS_PER_WORKER * num_workers // source.spec.row_length),
        num_units=_UNITS_PER_WORKER * num_workers,
        path=folder / "tokens",
    )
    output = folder / "targets"
    settings = dump.model_copy(
        update={"tokens": str(sample), "output": str(output), "worker": None, "num_workers": None}
        | {"seal": False, "force": False}
    )
    whole = run_workers(settings, folder=folder, num_workers=num_workers)
    manifest = seal_store(output)
    records = StoreWriter.create(output, StoreReader(output).spec).committed()
    rate = steady_rate(records, num_workers)
    tokens = [0] * num_workers
    for unit, record in records.items():
        tokens[unit % num_workers] += sum(record.num_tokens)
    startup = max(whole[worker] - tokens[worker] / rate for worker in range(num_workers))
    return Measured(rate, manifest.num_bytes / manifest.num_tokens, max(startup, 0.0), num_workers)


def steady_rate(records: Mapping[int, CommitRecord], num_workers: int) -> float:
    """Tokens per second of one worker, from the seconds in the records, without each worker's first unit."""
    chosen = [record for unit, record in records.items() if unit >= num_workers] or list(records.values())
    seconds = sum(float(record.extra["seconds"]) for record in chosen)
    return sum(sum(record.num_tokens) for record in chosen) / max(seconds, 1e-9)


def run_workers(dump: DumpConfig, *, folder: Path, num_workers: int) -> list[float]:
    """Seconds from start to end of each worker of `dump`, all started at once; their logs are left in `folder`.

    Raises UserError when a worker fails, with the end of what it printed.
    """
    (folder / "dump.yaml").write_text(yaml.safe_dump(dump.model_dump(mode="json")), encoding="utf-8")
    threads = os.environ.get("OMP_NUM_THREADS") or str(-(-(os.cpu_count() or 1) // num_workers))
    command = [sys.executable, "-m", "potstill.launch", "dump", "--config", str(folder / "dump.yaml")]
    logs = [folder / f"worker-{worker}.log" for worker in range(num_workers)]
    began = time.monotonic()
    seconds = [0.0] * num_workers
    children = []
    try:
        for worker, log in enumerate(logs):
            place = ["--worker", str(worker), "--num-workers", str(num_workers)]
            environment = {"OMP_NUM_THREADS": threads, "LOCAL_RANK": str(worker)}
            children.append(start([*command, *place], environment=environment, output=log))
        while not all(seconds):
            for worker, child in enumerate(children):
                code = child.poll()
                if code:
                    text = logs[worker].read_text(encoding="utf-8", errors="replace").strip()
                    raise UserError(f"calibration: worker {worker} ended with code {code}: {text[-1000:]}")
                if code == 0 and not seconds[worker]:
                    seconds[worker] = time.monotonic() - began
            time.sleep(0.02)
    finally:
        for child in children:
            stop(child)
    return seconds


def _sample_store(tokens: StoreReader, *, num_rows: int, num_units: int, path: Path) -> Path:
    from potstill.storage import StoreWriter, seal_store

    num_rows = min(num_rows, tokens.num_rows)
    chosen = [number * tokens.num_rows // num_rows for number in range(num_rows)]
    rows = [replace(row, row=number) for number, row in enumerate(tokens.rows(chosen))]
    # Units at least so large that what each weighs besides its rows does not show in the bytes per token.
    fewest = -(-_TOKENS_PER_UNIT // tokens.spec.row_length)
    per_unit = min(tokens.spec.rows_per_unit, max(fewest, num_rows // num_units))
    spec = replace(tokens.spec, rows_per_unit=per_unit)
    writer = StoreWriter.create(path, spec)
    for unit, first in enumerate(range(0, num_rows, per_unit)):
        writer.commit_unit(unit, rows[first : first + per_unit])
    seal_store(path)
    return path
