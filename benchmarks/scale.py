"""What grows with a store: start and end of a worker, status, seal, a student's start and reads, at 100 billion tokens.

    python -m benchmarks.scale [--units 95368] [--rows-per-unit 256] [--row-length 4096] [--delay-ms 30] [--ranks 1024]
                               [--workers 1 64 1024] [--node-ranks 2] [--place local object] [--only STEP ...] [--quick]

Synthetic stores of that size (real records; data files without bytes but for the rows that are read) are written to a
folder, and served from it by a store server on loopback that waits with each request (benchmarks/scale_server.py). Each
figure is taken in a fresh process through the doors that users have:

worker   run_worker of a dump with one unit left to do, from the call to the teacher's first batch and from its last to
         the return: opening, records, what others refused, the last unit's commit. The teacher is a real one of no
         size; what is left out is loading and running a large one. Memory is what comes on top of the same run over a
         tiny store. Once for each of --workers, which share the units: the slowest counts, and CPU seconds stand
         beside, as another program on the machine lengthens the others.
status   store_status. seal: seal_store(fast=True); a verifying seal reads all bytes of the units besides.
student  check_run and Loader as a rank of the trainer opens them, to the first batch in hand. selector: the same by
         --node-ranks ranks of a node at once, with the row selector over all rows. Left out: the model, DeepSpeed and
         torch.distributed.
rows     rows in global order from the URL: bytes that the server sent over the bytes of the rows used.

Memory is proportional (shared pages are divided), of a step with all that it starts, sampled, and a lone process's own
peak. A table comes first; the last line is one JSON object. Names that end in _object are of the object store.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.about import about, about_line
from benchmarks.scale_server import Served, serving
from benchmarks.scale_store import TINY, Sizes, complete, make_stores, open_again, put_rows
from benchmarks.scale_watch import Watched, watch
from potstill.storage import seal_store

STEPS = ("worker", "status", "seal", "student", "selector", "rows")
PLACES = ("local", "object")
QUICK = {"units": 24, "rows_per_unit": 8, "row_length": 64, "delay_ms": 2.0, "ranks": 8, "workers": [4]}
RECORD_BYTES = 40_000  # of a unit's records in both stores, and the files of no bytes
INDEX_BYTES = 400  # of a row: both indexes, what is put while sealing, and a node's copies


@dataclass(frozen=True)
class Goal:
    """A figure, what it must not exceed in either place (None: nothing is asked there), and how it is shown."""

    name: str
    what: str
    local: float | None
    on_object: float | None
    unit: str = "s"

    def limit(self, place: str) -> float | None:
        return self.local if place == "local" else self.on_object


GOALS = (
    Goal("worker_start_s", "start of a worker", 2, 2),
    Goal("worker_start_mb", "memory of a worker's start, above the model", 300, 300, "MB"),
    Goal("worker_end_s", "end of a worker", 5, 5),
    Goal("status_s", "status", 5, 5),
    Goal("seal_s", "seal", 60, 300),
    Goal("seal_mb", "memory of the seal", 2000, 2000, "MB"),
    Goal("first_batch_s", "a student's first batch", 2, None),
    Goal("selector_node_mb", "row selector, memory of a node", 2000, 2000, "MB"),
    Goal("selector_s", "row selector to the first batch", None, None),
    Goal("url_overhead", "bytes from a URL over those of the rows", None, 1.05, ""),
    Goal("requests_per_rank", "requests of a rank or worker that starts", None, 100, ""),
)
# Figures that only an object store has: they stand in the JSON under their plain names as well.
OF_URLS = ("url_overhead", "requests_per_rank")


@dataclass
class Bench:
    """One run of the benchmark: its settings, the stores, and the figures so far, by name and place."""

    options: argparse.Namespace
    sizes: Sizes
    scratch: Path
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def note(self, place: str, detail: str | None = None, **figures: float) -> None:
        """Keep figures of the table, the largest where there are several; `detail` names where each came from."""
        for name, value in figures.items():
            by_place = self.figures.setdefault(name, {})
            by_place[place] = max(value, by_place.get(place, 0.0))
        if detail is not None:
            told = {name: round(value, 3) for name, value in figures.items()}
            self.details[f"{detail}_{place}"] = told
            print(f"  {place}, {detail}: {told}", flush=True)

    def run(self, step: str, served: Served | None, each: list[dict[str, Any]]) -> Watched:
        """One step in fresh processes, with a temporary folder and a node's cache of its own."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            common = {
                "root": str(self.sizes.root),
                "num_units": self.sizes.num_units,
                "rows_per_unit": self.sizes.rows_per_unit,
                "row_length": self.sizes.row_length,
                "scratch": folder,
                "tiny": str(self.scratch / f"tiny_{step}"),
                "place": str(self.sizes.root) if served is None else "s3://bucket",
                "cache": f"{folder}/cache",
                "url": None if served is None else served.url,
            }
            environment = {"TMPDIR": folder, "HF_HUB_OFFLINE": "1"} | ({} if served is None else served.environment)
            return watch(
                step,
                [common | options for options in each],
                environment=environment,
                log=self.scratch / "log.txt",
                timeout_seconds=60 * self.options.step_minutes,
            )

    @contextlib.contextmanager
    def place(self, name: str) -> Iterator[Served | None]:
        """The folder itself, or a fresh server over it: what is put there is gone afterwards."""
        if name == "local":
            yield None
            return
        seconds = 60 * self.options.step_minutes + 600
        with serving(self.sizes.root, delay_seconds=self.options.delay_ms / 1000, seconds=seconds) as served:
            yield served


def measure_worker(bench: Bench, place: str) -> None:
    for num_workers in bench.options.workers:
        with bench.place(place) as served:
            found = bench.run("worker", served, [{"num_workers": num_workers}])
        if served is None:
            open_again(bench.sizes)
        figures = found.figures[0]
        bench.note(
            place,
            f"worker_of_{num_workers}",
            **figures["figures"],
            worker_start_mb=found.peak_mb,
            **({} if served is None else {"dump_worker_requests": num_requests(figures["counts"])}),
        )
        if served is not None and num_workers == bench.options.ranks:
            bench.note(place, requests_per_rank=num_requests(figures["counts"]))


def num_requests(counts: dict[str, int]) -> int:
    return sum(counts.get(verb, 0) for verb in ("GET", "HEAD", "LIST", "PUT", "DELETE"))


def measure_status(bench: Bench, place: str) -> None:
    with bench.place(place) as served:
        found = bench.run("status", served, [{}])
    bench.note(place, "status", **found.figures[0]["figures"], status_mb=found.peak_mb)


def measure_seal(bench: Bench, place: str) -> None:
    with bench.place(place) as served:
        found = bench.run("seal", served, [{}])
    bench.note(place, "seal", **found.figures[0]["figures"], seal_mb=found.peak_mb)


def student_options(bench: Bench, *, selects: bool, rank: int) -> dict[str, Any]:
    world = bench.options.ranks
    return {"selects": selects, "rank": rank, "world": world, "batch_rows": 2 * world}


def measure_student(bench: Bench, place: str, *, selects: bool = False) -> None:
    """One rank without a row selector, or the ranks of a node with one."""
    num_ranks = bench.options.node_ranks if selects else 1
    each = [student_options(bench, selects=selects, rank=rank) for rank in range(num_ranks)]
    with bench.place(place) as served:
        if served is None:  # rows get their bytes first
            for options in each:
                bench.run("student", served, [{**options, "fills": True}])
            drop_page_cache(bench.sizes.root)
        else:
            served.counts(reset=True)
        found = bench.run("student", served, each)
        counts = {} if served is None else served.counts()
    parts = [rank["figures"] for rank in found.figures]
    figures: dict[str, float] = {name: max(part[name] for part in parts) for name in parts[0]}
    if selects:
        figures |= {"selector_node_mb": found.peak_mb, "selector_kept_mb": found.kept_mb}
    else:
        figures["student_mb"] = found.peak_mb
    if served is not None:
        figures |= {"requests_per_rank": num_requests(counts) / num_ranks, "mb_sent": counts["bytes_sent"] / 1e6}
    bench.note(place, f"node_of_{num_ranks}_ranks" if selects else "student", **figures)


def measure_selector(bench: Bench, place: str) -> None:
    measure_student(bench, place, selects=True)


def measure_rows(bench: Bench, place: str) -> None:
    if place == "local":
        return
    rows = bench.options.read_rows
    with bench.place(place) as served:
        options = {"batch_rows": 16, "num_batches": -(-rows // 16)}
        figures = bench.run("rows", served, [options]).figures[0]
    bench.note(
        place,
        "rows",
        url_overhead=figures["overhead"],
        url_overhead_tokens=figures["overhead_tokens"],
        url_overhead_targets=figures["overhead_targets"],
        requests_per_row=figures["requests_per_row"],
    )


MEASURES = {
    "worker": measure_worker,
    "status": measure_status,
    "seal": measure_seal,
    "student": measure_student,
    "selector": measure_selector,
    "rows": measure_rows,
}


def drop_page_cache(root: Path) -> None:
    """Indexes and manifests come from the disk again."""
    os.sync()
    for path in [*root.glob("*/index*"), *root.glob("*/manifest.json")]:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run_all(bench: Bench) -> None:
    """First what needs a store with a unit to do, then the seal in both places, then what reads the sealed one."""
    options = bench.options
    for step in ("worker", "status"):
        for place in options.place:
            if step in options.only:
                MEASURES[step](bench, place)
    if not set(options.only) & {"seal", "student", "selector", "rows"}:
        return
    complete(bench.sizes)
    if "seal" in options.only:
        for place in sorted(options.place, reverse=True):  # the folder itself is sealed last, and stays so
            measure_seal(bench, place)
    seal_store(bench.sizes.root / "targets", fast=True)
    for step in ("student", "selector", "rows"):
        for place in options.place:
            if step in options.only:
                MEASURES[step](bench, place)


def result(bench: Bench) -> dict[str, Any]:
    """All figures by name, what was asked, and how many goals are met."""
    found: dict[str, Any] = {}
    for name, by_place in bench.figures.items():
        for place, value in by_place.items():
            found[name if place == "local" else f"{name}_object"] = round(value, 4)
            if name in OF_URLS:
                found[name] = round(value, 4)
    judged = [value <= limit for _, value, limit in asked(bench)]
    settings = {name: getattr(bench.options, name) for name in (*QUICK, "node_ranks", "read_rows", "place")}
    return {
        **found,
        "goals_met": sum(judged),
        "goals_measured": len(judged),
        "details": bench.details,
        **about(),
        "settings": settings,
    }


def asked(bench: Bench) -> Iterator[tuple[Goal, float, float]]:
    """Each figure that has a goal, with it."""
    for goal in GOALS:
        for place, value in bench.figures.get(goal.name, {}).items():
            limit = goal.limit(place)
            if limit is not None:
                yield goal, value, limit


def table(bench: Bench) -> str:
    """Each figure in both places beside its goals, and whether they hold, as Markdown."""
    lines = ["| figure | local | goal | object store | goal |", "|---|---|---|---|---|"]
    for goal in GOALS:
        cells = [goal.what]
        for place in PLACES:
            value, limit = bench.figures.get(goal.name, {}).get(place), goal.limit(place)
            cells.append("-" if value is None else shown(value, goal.unit))
            held = "" if value is None or limit is None else " yes" if value <= limit else " **no**"
            cells.append("-" if limit is None else f"{shown(limit, goal.unit)}{held}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(value: float, unit: str) -> str:
    digits = 0 if value >= 100 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f} {unit}".strip()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=95_368, help="units of the store (95368: 100 billion tokens)")
    parser.add_argument("--rows-per-unit", type=int, default=256)
    parser.add_argument("--row-length", type=int, default=4096)
    parser.add_argument("--delay-ms", type=float, default=30.0, help="how long the object store waits with a request")
    parser.add_argument("--ranks", type=int, default=1024, help="ranks that a student has, and workers a dump (1024)")
    parser.add_argument("--workers", type=int, nargs="+", help="workers that share the units, each tried (1 64 RANKS)")
    parser.add_argument("--node-ranks", type=int, default=2, help="ranks on the node of the row selector (2)")
    parser.add_argument("--read-rows", type=int, default=512, help="rows that are read from the URL (512)")
    parser.add_argument("--place", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--folder", type=Path, help="where the stores are written (default: the temporary folder)")
    parser.add_argument("--keep", action="store_true", help="leave the stores there, and say where")
    parser.add_argument("--step-minutes", type=float, default=120.0, help="a step that takes longer is ended (120)")
    parser.add_argument(
        "--serve", type=Path, metavar="FOLDER", help="only serve the files of a folder, until interrupted"
    )
    parser.add_argument("--quick", action="store_true", help=f"so small that figures mean nothing: {QUICK}")
    parser.add_argument("--output", type=Path, help="also write the table and the JSON to this file")
    options = parser.parse_args()
    for name, value in QUICK.items() if options.quick else ():
        setattr(options, name, value)
    options.workers = options.workers or [1, 64, options.ranks]
    if options.units < max(2, *options.workers):
        parser.error(f"--units {options.units}: there are fewer units than workers ({max(options.workers)})")
    return options


def make_tiny(scratch: Path, only: Collection[str]) -> None:
    """The stores that steps get ready with: for workers with a unit to do, for students sealed."""
    for step in {"student" if step == "selector" else step for step in only} & {"worker", "student", "rows"}:
        tiny = Sizes(scratch / f"tiny_{step}", **TINY)
        tiny.root.mkdir()
        make_stores(tiny)
        if step != "worker":
            complete(tiny)
            seal_store(tiny.root / "targets", fast=True)
            put_rows(tiny, np.arange(tiny.num_rows))


def check_room(folder: Path, sizes: Sizes) -> None:
    """Raise SystemExit where the disk has no room for the records and indexes."""
    needed = RECORD_BYTES * sizes.num_units + INDEX_BYTES * sizes.num_rows
    free = shutil.disk_usage(folder).free
    if free < 1.2 * needed:
        sys.exit(
            f"{folder}: {free / 1e9:.1f} GB are free, about {needed / 1e9:.1f} GB are needed; name another --folder"
        )


def main() -> None:
    options = parse()
    if options.serve:
        with (
            contextlib.suppress(KeyboardInterrupt),
            serving(options.serve, delay_seconds=options.delay_ms / 1000) as served,
        ):
            print("\n".join(f"{name}={value}" for name, value in served.environment.items()), flush=True)
            time.sleep(7200)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    root = Path(tempfile.mkdtemp(prefix="potstill_scale_", dir=options.folder))
    sizes = Sizes(root / "stores", options.units, options.rows_per_unit, options.row_length)
    print(f"{about_line()} Load {os.getloadavg()[0]:.1f}.", flush=True)
    try:
        check_room(root, sizes)
        for folder in (sizes.root, root / "scratch"):
            folder.mkdir()
        began = time.perf_counter()
        make_stores(sizes)
        print(
            f"{sizes.num_units} units of {sizes.num_rows} rows made in {time.perf_counter() - began:.0f} s", flush=True
        )
        make_tiny(root / "scratch", options.only)
        bench = Bench(options, sizes, root / "scratch")
        run_all(bench)
        found = json.dumps(result(bench))
        print(table(bench))
        if options.output:
            options.output.write_text(f"{about_line()}\n\n{table(bench)}\n\n{found}\n")
        if options.keep:
            print(f"the stores stay in {sizes.root}")
        print(found)
    finally:
        if not options.keep:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
