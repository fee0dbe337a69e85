"""The loader at the size of a real run: first batch, throughput, memory over time, planning for many ranks.

    python -m benchmarks.loader [--minutes 10] [--rows 12207032] [--output FILE]

1. A synthetic store of 100B tokens (12.2 M rows of 8192): a real manifest and a real index of every row, unit files
   only for the rows of the first batch. Measured from opening both stores to the first batch of tokens and targets.
2. A real store of some hundred rows, read in global order: cold (page cache dropped for its files) and warm.
3. Resident memory while a consumer takes batches for some minutes.
4. 1024 simulated ranks planning over 1e10 rows.

Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.store_codec import select
from benchmarks.teacher_stand_in import make_dumps
from potstill.storage import (
    EpochPlan,
    Loader,
    RunSpec,
    SparseTargets,
    StoreReader,
    StoreWriter,
    TargetsRow,
    TokensRow,
    seal_store,
    token_digest,
)
from potstill.storage.files.paths import open_folder
from potstill.storage.files.unit_file import encode_unit
from potstill.storage.rows.row_types import Row
from potstill.storage.store.index import column_types, encode_index
from potstill.storage.store.seal import INDEX_NAME, MANIFEST_NAME, Manifest, UnitEntry, store_digest

ROW_LENGTH, ROWS_PER_UNIT, VOCAB = 8192, 256, 32_000
GLOBAL_BATCH, SEED = 64, 11
NUM_RANKS, PLANNED_ROWS, PLANNED_BATCH = 1024, 10**10, 4096


def spec_of(kind: str, num_rows: int, input_digest: str | None, rows_per_unit: int) -> RunSpec:
    targets = kind == "targets"
    return RunSpec(
        kind=kind,
        row_length=ROW_LENGTH,
        rows_per_unit=rows_per_unit,
        num_rows=num_rows if targets else None,
        vocab_size=VOCAB,
        tokenizer_digest="bench",
        input_digest=input_digest,
        selection={"mode": "top_p_k", "p": 0.95, "k": 100} if targets else None,
        stats=("mean_loss",) if targets else (),
    )


class Rows:
    """Rows that share one dump but differ in tokens and number."""

    def __init__(self) -> None:
        self.targets: SparseTargets = select(make_dumps(VOCAB, (2.1,), positions=ROW_LENGTH)[2.1], "topp95")

    def tokens(self, row: int) -> TokensRow:
        rng = np.random.default_rng(row)
        return TokensRow(row, rng.integers(0, VOCAB, ROW_LENGTH).astype(np.int32), np.array([ROW_LENGTH], np.int32))

    def row(self, kind: str, row: int) -> Row:
        tokens = self.tokens(row)
        if kind == "tokens":
            return tokens
        return TargetsRow(row, token_digest(tokens.tokens, tokens.doc_lens), self.targets, {"mean_loss": 1.0})


def synthetic_store(path: Path, kind: str, num_rows: int, wanted: np.ndarray, source: Rows, digest: str | None) -> str:
    """A sealed store of `num_rows` rows of which only the `wanted` ones have bytes; returns its digest."""
    spec = spec_of(kind, num_rows, digest, ROWS_PER_UNIT)
    writer = StoreWriter.create(path, spec)
    folder = open_folder(path)
    columns = {name: np.zeros(num_rows, dtype) for name, dtype in column_types(spec.stats)}
    columns["unit"][:] = np.arange(num_rows) // ROWS_PER_UNIT
    columns["num_tokens"][:] = ROW_LENGTH
    num_units = -(-num_rows // ROWS_PER_UNIT)
    units = [UnitEntry(f"u{u:07d}-000000000000.arrow", 0, "0" * 64) for u in range(num_units)]
    for unit in np.unique(wanted // ROWS_PER_UNIT):
        rows = np.sort(wanted[wanted // ROWS_PER_UNIT == unit])
        encoded = encode_unit([source.row(kind, int(r)) for r in rows], spec=spec, unit=int(unit), id_map=None)
        folder.put(f"units/{units[unit].file}", encoded.data)
        for row, batch in zip(rows, encoded.batches, strict=True):
            columns["offset"][row], columns["length"][row] = batch.offset, batch.length
            columns["crc32"][row] = batch.crc32
            columns["num_entries"][row] = encoded.num_entries[0]
    data, blocks = encode_index(columns, writer.spec.fingerprint)
    folder.put(INDEX_NAME, data)
    manifest = Manifest(
        fingerprint=spec.fingerprint,
        store_digest=store_digest(spec.fingerprint, [u.sha256 for u in units]),
        num_rows=num_rows,
        num_tokens=num_rows * ROW_LENGTH,
        num_entries=0,
        num_targets=0,
        num_bytes=0,
        units=tuple(units),
        index_file=INDEX_NAME,
        index_bytes=len(data),
        index_sha256="0" * 64,
        index_blocks=tuple(blocks),
    )
    folder.put(MANIFEST_NAME, manifest.to_bytes())
    return manifest.store_digest


def first_batch(root: Path, num_rows: int, source: Rows, show: Callable[[str], None]) -> dict[str, float]:
    plan = EpochPlan(num_rows, global_batch=GLOBAL_BATCH, seed=SEED, joined=("teacher",))
    # One batch is prefetched beyond the first, so the rows of two are needed.
    wanted = np.concatenate([plan.rows(0), plan.rows(1)])
    digest = synthetic_store(root / "tokens", "tokens", num_rows, wanted, source, None)
    synthetic_store(root / "targets", "targets", num_rows, wanted, source, digest)
    drop_page_cache(root)
    start, cpu = time.perf_counter(), time.process_time()
    tokens, targets = StoreReader(root / "tokens"), StoreReader(root / "targets")
    opened = time.perf_counter() - start
    with Loader(plan, tokens, {"teacher": targets}, prefetch_batches=1) as loader:
        batch = next(loader)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert len(batch.tokens) == GLOBAL_BATCH
    start = time.perf_counter()
    assert len(targets.row_stats["mean_loss"]) == num_rows
    stats_seconds = time.perf_counter() - start
    show(
        f"first batch of {num_rows} rows ({num_rows * ROW_LENGTH / 1e9:.0f}B tokens), cold: open {opened:.3f} s, "
        f"first batch of {GLOBAL_BATCH} rows {seconds:.3f} s ({cpu:.2f} CPU seconds "
        f"with the batch read ahead); one statistic of all rows {stats_seconds:.2f} s"
    )
    return {
        "first_batch_s": round(seconds, 3),
        "first_batch_cpu_s": round(cpu, 3),
        "open_s": round(opened, 3),
        "row_stats_s": round(stats_seconds, 3),
    }


def real_stores(root: Path, num_rows: int, source: Rows) -> None:
    for kind in ("tokens", "targets"):
        digest = StoreReader(root / "tokens").digest if kind == "targets" else None
        writer = StoreWriter.create(root / kind, spec_of(kind, num_rows, digest, 16))
        for unit in range(num_rows // 16):
            writer.commit_unit(unit, [source.row(kind, r) for r in writer.unit_rows(unit)])
        seal_store(root / kind)


def drop_page_cache(root: Path) -> None:
    os.sync()
    for path in root.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def batches(root: Path, num_rows: int, threads: int) -> Iterator[int]:
    """Tokens of batch after batch, without end."""
    plan = EpochPlan(num_rows, global_batch=16, seed=SEED, joined=("teacher",))
    readers = StoreReader(root / "tokens"), StoreReader(root / "targets")
    with Loader(plan, readers[0], {"teacher": readers[1]}, num_threads=threads) as loader:
        while True:
            batch = next(loader)
            loader.commit(batch.batch)
            yield sum(len(row.tokens) for row in batch.tokens)


def throughput(root: Path, num_rows: int, show: Callable[[str], None]) -> dict[str, float]:
    figures = {}
    for name in ("cold", "warm"):
        if name == "cold":
            drop_page_cache(root)
        stream, total = batches(root, num_rows, 2), 0
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(num_rows // 16):
            total += next(stream)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        stream.close()  # type: ignore[attr-defined]  # a generator
        figures[f"{name}_tokens_per_s"] = round(total / seconds)
        show(f"{name}: {total / seconds / 1e6:.2f} M tokens/s by the clock, {total / cpu / 1e6:.2f} M per CPU second")
    return figures


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def memory(root: Path, num_rows: int, minutes: float, show: Callable[[str], None]) -> dict[str, float]:
    samples: list[int] = []
    stream = batches(root, num_rows, 2)
    end, next_sample, count = time.monotonic() + 60 * minutes, 0.0, 0
    while time.monotonic() < end:
        next(stream)
        count += 1
        # A student step takes time as well; without it this would only measure a busy machine.
        time.sleep(0.1)
        if time.monotonic() >= next_sample:
            samples.append(resident_bytes())
            next_sample = time.monotonic() + 0.5
    stream.close()  # type: ignore[attr-defined]  # a generator
    quarter = max(1, len(samples) // 4)
    early, late = np.mean(samples[quarter : 2 * quarter + 1]), np.mean(samples[-quarter:])
    growth = float(late / early - 1)
    show(f"memory: {count} batches in {minutes} min, {early / 2**20:.0f} MiB early, {late / 2**20:.0f} MiB late")
    return {"rss_growth": round(growth, 4), "minutes": minutes}


def planning(show: Callable[[str], None]) -> dict[str, float]:
    before = resident_bytes()
    start, rows = time.process_time(), 0
    for rank in range(NUM_RANKS):
        plan = EpochPlan(PLANNED_ROWS, global_batch=PLANNED_BATCH, seed=SEED)
        mine = plan.rows(rank * 1000)
        mine = mine[PLANNED_BATCH * rank // NUM_RANKS : PLANNED_BATCH * (rank + 1) // NUM_RANKS]
        assert len(mine) == PLANNED_BATCH // NUM_RANKS
        rows += PLANNED_BATCH
    seconds, grown = time.process_time() - start, resident_bytes() - before
    show(
        f"planning: {NUM_RANKS} ranks over {PLANNED_ROWS:.0e} rows, {rows / seconds / 1e6:.2f} M rows/s per CPU "
        f"second, {grown / 2**20:.1f} MiB more memory"
    )
    return {"plan_rows_per_s": round(rows / seconds), "plan_memory_mib": round(grown / 2**20, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="how long memory is watched")
    parser.add_argument("--rows", type=int, default=12_207_032, help="rows of the synthetic index")
    parser.add_argument("--real-rows", type=int, default=256, help="rows of the real store (a multiple of 16)")
    parser.add_argument("--folder", help="where to put the stores (default: a temporary folder)")
    parser.add_argument("--output", help="also write everything to this file")
    args = parser.parse_args()
    lines: list[str] = []

    def show(text: str) -> None:
        lines.append(text)
        print(text, flush=True)

    show(
        f"potstill loader, {time.strftime('%Y-%m-%d')}, {platform.machine()} with {os.cpu_count()} cores "
        f"(load {os.getloadavg()[0]:.1f}), Python {platform.python_version()}, numpy {np.__version__}, "
        f"pyarrow {pa.__version__}"
    )
    figures: dict[str, Any] = planning(show)
    root = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        source = Rows()
        (root / "large").mkdir()
        figures |= first_batch(root / "large", args.rows, source, show)
        shutil.rmtree(root / "large")
        (root / "real").mkdir()
        real_stores(root / "real", args.real_rows, source)
        figures |= throughput(root / "real", args.real_rows, show)
        figures |= memory(root / "real", args.real_rows, args.minutes, show)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    show(json.dumps(figures))
    if args.output:
        with open(args.output, "w") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
