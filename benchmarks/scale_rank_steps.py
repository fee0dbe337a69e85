"""The measured steps of a dump's worker and of a student's rank; how they are run is in scale_steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.scale_server import counts_at
from benchmarks.scale_steps import Figures, Options, clocks, spent
from benchmarks.scale_store import TINY, Sizes, dump_config, open_again, put_rows
from benchmarks.scale_template import TEMPLATES, Template
from potstill.storage import Loader, StoreReader
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.data.step_batch import BatchFinisher, StepBatch
from potstill.student_train.run.preflight import CheckedRun, check_run
from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.config import DumpConfig
from potstill.teacher_dump.dumping import DumpJob, DumpResult
from potstill.teacher_dump.engines.base import TeacherEngine
from potstill.teacher_dump.worker import run_worker

SHARE = 0.5  # of the rows, that the row selector keeps
WARM_BATCHES = 2  # read before the steady part
HELD: list[object] = []  # so that what a rank keeps is kept until it has been looked at


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
    finish = BatchFinisher(
        plan=checked.plan,
        micro_batch_rows=config.data.micro_batch_rows,
        row_length=checked.stores.spec.row_length,
        terms=(),
        device=torch.device("cpu"),
    )
    return Loader(
        checked.plan,
        checked.stores.sources,
        finish=finish,
        prefetch_batches=config.data.prefetch_batches,
        num_threads=config.data.num_threads,
        **options,
    )


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


def fill_rows_that_are_read(sizes: Sizes) -> None:
    """From now on rows get their bytes on disk as they are first read; for a run that nobody measures."""
    read = StoreReader.rows

    def rows(reader: StoreReader, ids: Sequence[int] | NDArray[np.int64]) -> Any:
        put_rows(sizes, np.asarray(ids, np.int64))
        return read(reader, ids)

    StoreReader.rows = rows  # type: ignore[method-assign, assignment]


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


RANK_STEPS: dict[str, Callable[[Options], Callable[[], Figures]]] = {
    "worker": ready_worker,
    "student": ready_student,
    "rows": ready_rows,
}
