"""The steps that benchmarks/scale.py measures, each in a fresh process that the benchmark starts and watches.

    python -m benchmarks.scale_steps STEP JSON

A step gets ready (imports, a first run over a tiny store), says so, waits for a line, does the work that is measured,
prints its figures as one line of JSON and waits for another line, so that what it keeps can be looked at.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.scale_server import counts_at
from benchmarks.scale_store import TINY, Sizes, dump_config, open_again, put_rows
from benchmarks.scale_template import TEMPLATES, Template
from potstill.common.processes import die_with_parent
from potstill.storage import Loader, StoreReader, seal_store, store_status
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.data.step_batch import BatchFinisher, StepBatch
from potstill.student_train.run.preflight import CheckedRun, check_run
from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.config import DumpConfig
from potstill.teacher_dump.dumping import DumpJob, DumpResult
from potstill.teacher_dump.engines.base import TeacherEngine
from potstill.teacher_dump.worker import run_worker

Options = dict[str, Any]
Figures = dict[str, Any]
SHARE = 0.5  # of the rows, that the row selector keeps
WARM_BATCHES = 2  # read before the steady part


class ClockedJob(DumpJob):
    """A dump that notes when its teacher is called first and last, and what had been asked of the server by then."""

    first: tuple[float, float] | None = None  # by the clock, and CPU seconds
    last = (0.0, 0.0)
    counts: dict[str, int]
    url: str | None = None

    def compute(self, engine: TeacherEngine, batch: TeacherBatch, vocab_size: int) -> DumpResult:
        cls = type(self)  # the job itself is frozen
        if cls.first is None:
            cls.first = clocks()
            cls.counts = {} if cls.url is None else counts_at(cls.url)
        found = super().compute(engine, batch, vocab_size)
        cls.last = clocks()
        return found


def clocks() -> tuple[float, float]:
    """Seconds by the clock, and those that processors spent on this process and on those that it waited for."""
    spent = os.times()
    return time.perf_counter(), spent.user + spent.system + spent.children_user + spent.children_system


def spent(name: str, began: tuple[float, float], ended: tuple[float, float]) -> Figures:
    """Both between two moments: `name_s` and `name_cpu_s`."""
    return {f"{name}_s": ended[0] - began[0], f"{name}_cpu_s": ended[1] - began[1]}


def sizes_of(options: Options) -> Sizes:
    return Sizes(Path(options["root"]), options["num_units"], options["rows_per_unit"], options["row_length"])


def work(config: DumpConfig, worker: int, num_workers: int, url: str | None) -> Figures:
    """One worker from its call to its first batch, and from its last to the return."""
    ClockedJob.first, ClockedJob.url = None, url
    began = clocks()
    summary = run_worker(config, config.teacher, ClockedJob(config), worker=worker, num_workers=num_workers)
    ended = clocks()
    if ClockedJob.first is None or summary.units != 1 or summary.num_missing:
        raise RuntimeError(f"the worker was to make one unit and complete the store: {summary.format()}")
    start, end = spent("worker_start", began, ClockedJob.first), spent("worker_end", ClockedJob.last, ended)
    return {"figures": start | end, "counts": ClockedJob.counts}


def ready_worker(options: Options) -> Callable[[], Figures]:
    """Imports, and the tiny store's dump, so that what is counted is what the large store adds."""
    sizes, tiny = sizes_of(options), Sizes(Path(options["tiny"]), **TINY)
    open_again(tiny)
    work(dump_config(tiny, str(tiny.root / "tokens"), str(tiny.root / "targets")), tiny.open_unit % 2, 2, None)
    config = dump_config(sizes, f"{options['place']}/tokens", f"{options['place']}/targets")
    num_workers = options["num_workers"]
    return lambda: work(config, sizes.open_unit % num_workers, num_workers, options.get("url"))


def ready_status(options: Options) -> Callable[[], Figures]:
    def status() -> Figures:
        began = clocks()
        found = store_status(f"{options['place']}/targets")
        ended = clocks()
        if found.committed != options["num_units"] - 1:
            raise RuntimeError(f"{found.committed} units are committed, expected {options['num_units'] - 1}")
        return {"figures": spent("status", began, ended)}

    return status


def ready_seal(options: Options) -> Callable[[], Figures]:
    def seal() -> Figures:
        began = clocks()
        manifest = seal_store(f"{options['place']}/targets", fast=True)
        ended = clocks()
        if len(manifest.units) != options["num_units"]:
            raise RuntimeError(f"{len(manifest.units)} units are sealed, expected {options['num_units']}")
        return {"figures": spent("seal", began, ended) | {"index_mb": manifest.index_bytes / 1e6}}

    return seal


def train_config(options: Options, *, selects: bool) -> TrainConfig:
    """A student's run over both stores. What a node keeps of stores at a URL lies in `cache`, a folder of this step."""
    place = options["place"]
    rows = {"score": {"kind": "stat", "of": [{"store": "teacher", "stat": "mean_loss"}]}, "share": SHARE}
    stage: dict[str, Any] = {"targets": "teacher", "alpha": 0.5} | ({"rows": rows} if selects else {})
    data = {
        "tokens": f"{place}/tokens",
        "targets": {"teacher": f"{place}/targets"},
        "global_batch_rows": options["batch_rows"],
        "cache_dir": options["cache"],
    }
    model = {"config": str(Path(options["root"]) / "teacher" / "config.json")}
    run = {"max_steps": 1000, "output_dir": f"{options['scratch']}/run"}
    return TrainConfig.model_validate({"model": model, "data": data, "run": run, "curriculum": [stage]})


def open_loader(config: TrainConfig, checked: CheckedRun, **options: Any) -> Loader[StepBatch]:
    """The loader of a rank, as the trainer opens it; the student that would train is left out."""
    import torch

    finish = BatchFinisher(
        plan=checked.plan,
        micro_batch_rows=config.data.micro_batch_rows,
        row_length=checked.stores.spec.row_length,
        terms=(),
        device=torch.device("cpu"),
    )
    threads = {"prefetch_batches": config.data.prefetch_batches, "num_threads": config.data.num_threads}
    return Loader(checked.plan, checked.stores.sources, finish=finish, **threads, **options)


def ready_student(options: Options) -> Callable[[], Figures]:
    """A rank of a student, from nothing to its first batch; one of several on a node where there are more."""
    world, rank = options["world"], options["rank"]
    config = train_config(options, selects=options["selects"])

    def first_batch() -> Figures:
        began = clocks()
        checked = check_run(config, world_size=world)
        opened = clocks()
        loader = open_loader(config, checked, rank=rank, world=world)
        batch = next(loader)
        ended = clocks()
        HELD.extend((checked, loader))
        if not batch.micros:
            raise RuntimeError(f"rank {rank} of {world} has no rows in its first batch")
        name = "selector" if options["selects"] else "first_batch"
        return {"figures": spent(f"{name}_open", began, opened) | spent(name, began, ended)}

    import_what_students_import(options, selects=options["selects"])
    if options.get("fills"):
        fill_rows_that_are_read(sizes_of(options))
    return first_batch


def import_what_students_import(options: Options, *, selects: bool) -> None:
    """A first batch of the tiny stores, read like the others and closed again: much is imported when it is needed."""
    cache = f"{options['cache']}-tiny-{os.getpid()}"
    tiny = {**options, "root": options["tiny"], "place": options["tiny"], "batch_rows": 2, "cache": cache}
    config = train_config(tiny, selects=selects)
    with open_loader(config, check_run(config, world_size=1)) as loader:
        next(loader)


HELD: list[object] = []  # so that what a rank keeps is kept until it has been looked at


def fill_rows_that_are_read(sizes: Sizes) -> None:
    """From now on rows get their bytes on disk as they are first read; for a run that nobody measures."""
    read = StoreReader.rows

    def rows(reader: StoreReader, ids: Sequence[int] | NDArray[np.int64]) -> Any:
        put_rows(sizes, np.asarray(ids, np.int64))
        return read(reader, ids)

    StoreReader.rows = rows  # type: ignore[method-assign]


def ready_rows(options: Options) -> Callable[[], Figures]:
    """Rows in global order from a URL, when a rank has run for a while: bytes sent over bytes of the rows used."""
    import_what_students_import(options, selects=False)
    config = train_config(options, selects=False)
    sizes, url = sizes_of(options), options["url"]

    def read() -> Figures:
        checked = check_run(config, world_size=1)
        first, end = WARM_BATCHES, WARM_BATCHES + options["num_batches"]
        for start, stop in ((0, first), (first, end)):
            counts_at(url, reset=True)
            with open_loader(config, checked, first_batch=start, end_batch=stop) as loader:
                num_batches = sum(1 for _ in loader)
        counts = counts_at(url)
        rows = np.concatenate([checked.plan.rows(batch) for batch in range(first, end)])
        own = own_bytes(sizes, rows)
        sent = {name: counts.get(f"bytes_sent/{name}", 0) for name in own}
        return {
            "batches": num_batches,
            "overhead": counts["bytes_sent"] / sum(own.values()),
            "requests_per_row": sum(counts.get(verb, 0) for verb in ("GET", "HEAD", "LIST")) / len(rows),
            **{f"overhead_{name}": sent[name] / own[name] for name in own},
        }

    return read


def own_bytes(sizes: Sizes, rows: NDArray[np.int64]) -> dict[str, float]:
    """Compressed bytes of these rows by store: of each its share of the record batch that it lies in."""
    found = {}
    for name in ("tokens", "targets"):
        by_place = Template.load(sizes.root / TEMPLATES / name).row_bytes
        found[name] = float(by_place[rows % sizes.rows_per_unit].sum())
    return found


STEPS: dict[str, Callable[[Options], Callable[[], Figures]]] = {
    "worker": ready_worker,
    "status": ready_status,
    "seal": ready_seal,
    "student": ready_student,
    "rows": ready_rows,
}


def resident(field: str) -> int:
    """Memory of this process by a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def reset_peak() -> int:
    """Begin to watch this process's own peak, which is over too quickly for one who looks now and then."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def main() -> None:
    die_with_parent()
    logging.basicConfig(level=logging.WARNING)
    step = STEPS[sys.argv[1]](json.loads(sys.argv[2]))
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()
    before = reset_peak()
    figures = step()
    print(json.dumps({**figures, "own_peak_bytes": resident("VmHWM") - before}), flush=True)
    sys.stdin.readline()
    os._exit(0)  # threads of loaders that read ahead are not waited for


if __name__ == "__main__":
    main()
