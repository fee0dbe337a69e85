"""Files that other projects' own writers made of a teacher's targets, beside this store on the same targets.

Each file is read as its writer's own reader reads it (tests/teacher_dump/test_foreign_targets.py holds the errors to
those that were measured with it); the store holds the teacher's own values. Both are compared with the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.about import about_line
from potstill.storage import RunSpec, SparseTargets, TargetsRow
from potstill.storage.files.unit_file import DecodedBatch, encode_unit
from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.importing.foreign_records import Entries, ForeignRecord
from potstill.teacher_dump.importing.import_targets_run import open_source
from potstill.teacher_dump.importing.targets_config import ImportTargetsConfig

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "foreign"
VOCAB = 8192
LEAST_TAIL = np.exp(-254 / 16)  # what the store's grid holds; also of sums above 1, which leave no tail
TOKEN_COLUMNS = {"input_ids", "attention_mask", "inputs", "line_number"}


@dataclass(frozen=True)
class Sample:
    """One folder of files (or one file of it), whose records are the truth's rows; prefix of the truth's arrays."""

    folder: str
    prefix: str = ""
    file: str | None = None
    kept: bool = False  # renormalised over the k


SAMPLES = (
    Sample("distillkit/recommended"),
    Sample("distillkit/recommended_k128", prefix="k128_"),
    Sample("distillkit/normalize_t"),
    Sample("distillkit/bf16_exact"),
    Sample("distillkit/fp32_exact_k8"),
    Sample("distillkit/delta"),
    Sample("distillkit/residual_bins"),
    Sample("distillkit/legacy"),
    Sample("megatron_logits/fp16_k32"),
    Sample("megatron_logits/bf16_k8"),
    Sample("hf_datasets/parquet"),
    Sample("hf_datasets/llamakd_layout_k8", file="train-1.parquet"),
    Sample("hf_datasets/arcee405b_layout", kept=True),
)


@dataclass(frozen=True)
class Fidelity:
    """Errors in nats of the values (mean, largest), of KL(teacher || read) over the kept ids and over k + 1 buckets."""

    bytes_per_position: float
    mean: float
    largest: float
    kl_kept: float
    kl_tail: float | None  # None where no tail is known


@dataclass(frozen=True)
class Comparison:
    """One row of the table."""

    name: str
    k: int
    positions: int
    theirs: Fidelity
    ours: Fidelity


def compare(sample: Sample, root: Path = FOLDER) -> Comparison:
    """Read one sample and put its targets through a unit file of ours."""
    folder = root / sample.folder
    source = folder if sample.file is None else folder / sample.file
    config = ImportTargetsConfig(input=[str(source)], output="unused", teacher="teacher-7m", tokenizer="unused")
    with np.load(folder.parent / "truth.npz") as arrays:
        true_ids, true_values = arrays[f"{sample.prefix}topk_ids"], arrays[f"{sample.prefix}topk_logprobs"]
    found: list[np.ndarray] = []
    wanted: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    for number, record in enumerate(_records(config)):
        assert isinstance(record.entries, Entries)
        num = record.entries.num_positions
        values = record.entries.values.reshape(num, -1)
        k = values.shape[1]
        order = np.argsort(record.entries.ids.reshape(num, k), axis=1)
        theirs = np.argsort(true_ids[number, :num, :k], axis=1)
        # Entries of equal logits may stand in either order: both are sorted by id, and put back as in the teacher.
        back = np.argsort(theirs, axis=1)
        found.append(np.take_along_axis(np.take_along_axis(values, order, 1), back, 1))
        wanted.append(true_values[number, :num, :k].astype(np.float64))
        ids.append(true_ids[number, :num, :k])
    read, true, kept_ids = np.concatenate(found), np.concatenate(wanted), np.concatenate(ids)
    if sample.kept:
        read, true = (table - np.log(np.exp(table).sum(1, keepdims=True)) for table in (read, true))
    num_positions, k = true.shape
    stored, stored_tail, num_bytes = through_store(kept_ids, true, kept=sample.kept)
    return Comparison(
        sample.folder,
        k,
        num_positions,
        fidelity(true, read, rest_of(read), _target_bytes(source) / num_positions, kept=sample.kept),
        fidelity(true, stored, stored_tail, num_bytes / num_positions, kept=sample.kept),
    )


def _records(config: ImportTargetsConfig) -> Iterator[ForeignRecord]:
    for found in open_source(config).read(Place(0, 0), entries=True):
        assert isinstance(found.record, ForeignRecord)
        yield found.record


def rest_of(logprobs: np.ndarray) -> np.ndarray:
    """Probability [N] outside of the entries [N, k], where nothing else says it."""
    rest: np.ndarray = np.maximum(1 - np.exp(logprobs).sum(1), LEAST_TAIL)
    return rest


def through_store(ids: np.ndarray, logprobs: np.ndarray, *, kept: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Values [N, k] and tails [N] as the store gives them back, and the bytes of the unit file that holds them."""
    num, k = ids.shape
    values = logprobs.astype(np.float32)
    order = np.lexsort((ids, -values))
    back = np.argsort(order, axis=1)
    tail = np.full(num, -np.inf) if kept else np.log(rest_of(logprobs))
    targets = SparseTargets.build(
        offsets=np.arange(num + 1) * k,
        ids=np.take_along_axis(ids, order, 1).reshape(-1),
        logprobs=np.minimum(np.take_along_axis(values, order, 1), 0).reshape(-1),
        log_tail=tail,
        vocab_size=VOCAB,
        strict=True,
    )
    spec = RunSpec(
        kind="targets",
        row_length=num,
        rows_per_unit=1,
        num_rows=1,
        vocab_size=VOCAB,
        tokenizer_digest="demo-bpe-8k",
        input_digest="truth",
        selection={"mode": "top_k", "k": k},
        normaliser="kept" if kept else "vocabulary",
    )
    encoded = encode_unit([TargetsRow(0, 1, targets)], spec=spec, unit=0, id_map=None)
    [batch] = encoded.batches
    message = encoded.data[batch.offset : batch.offset + batch.length]
    row = DecodedBatch(message, spec=spec, where="bench").decode(0, row=0, stats={}, id_map=None)
    assert isinstance(row, TargetsRow) and row.targets.logprobs is not None
    stored = row.targets.logprobs.reshape(num, k).astype(np.float64)
    return np.take_along_axis(stored, back, 1), np.exp(row.targets.log_tail.astype(np.float64)), len(encoded.data)


def fidelity(
    true: np.ndarray, read: np.ndarray, tail: np.ndarray, bytes_per_position: float, *, kept: bool
) -> Fidelity:
    """Errors of `read` [N, k] and its `tail` [N] against the teacher's values `true` [N, k], of the same ids."""
    difference = np.abs(read - true)

    def divergence(extra: bool) -> float:
        p, q = (np.exp(table) for table in (true, read))
        if extra:
            p, q = np.append(p, rest_of(true)[:, None], axis=1), np.append(q, tail[:, None], axis=1)
        p, q = (x / x.sum(1, keepdims=True) for x in (p, q))
        return float((p * (np.log(p) - np.log(q))).sum(1).mean())

    return Fidelity(
        bytes_per_position,
        float(difference.mean()),
        float(difference.max()),
        divergence(extra=False),
        None if kept else divergence(extra=True),
    )


def _target_bytes(source: Path) -> int:
    """Bytes on disk of the targets alone: of tables the columns, compressed, without tokens, footer and schema."""
    files = [source] if source.is_file() else sorted(source.iterdir())
    total = sum(path.stat().st_size for path in files if path.suffix == ".tar")
    for path in (path for path in files if path.suffix == ".parquet"):
        metadata = pq.ParquetFile(path).metadata
        for group in range(metadata.num_row_groups):
            columns = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
            targets = [one for one in columns if one.path_in_schema.split(".")[0] not in TOKEN_COLUMNS]
            total += sum(one.total_compressed_size for one in targets)
    return total


HEADER = (
    f"{'':<32}{'':>5}{'posi-':>6} | {'their file':^46} | {'this store, the same targets':^46}\n"
    f"{'files':<32}{'k':>5}{'tions':>6} | {'B/token':>8}{'mean':>9}{'max':>8}{'KL kept':>10}{'KL k+1':>10}  | "
    f"{'B/token':>8}{'mean':>9}{'max':>8}{'KL kept':>10}{'KL k+1':>10}"
)


def row_text(found: Comparison) -> str:
    def side(one: Fidelity) -> str:
        tail = f"{'-':>10}" if one.kl_tail is None else f"{one.kl_tail:>10.1e}"
        return f"{one.bytes_per_position:>8.1f}{one.mean:>9.4f}{one.largest:>8.3f}{one.kl_kept:>10.1e}{tail}"

    return f"{found.name:<32}{found.k:>5}{found.positions:>6} | {side(found.theirs)}  | {side(found.ours)}"


def run_foreign(show: Callable[[str], None], root: Path = FOLDER) -> dict[str, Any]:
    """The table; returns the figures for JSON, none where the files are not there (which is said)."""
    if not root.is_dir():
        show(f"\nforeign files: left out, {root} does not exist")
        return {}
    show(f"\nforeign files beside this store, {about_line()}")
    show(
        "B/token: of the targets alone (their columns or tars; our whole unit file, with tails), by stored position.\n"
        "mean, max: errors of the values in nats. KL(teacher || read): of kept ids renormalised, and with the tail.\n"
        "The teacher has 8,192 ids: a larger vocabulary takes more bytes for ids in every format."
    )
    show(HEADER)
    figures: dict[str, Any] = {}
    for sample in SAMPLES:
        found = compare(sample, root)
        show(row_text(found))
        sides = (("their", found.theirs), ("our", found.ours))
        figures[sample.folder] = {f"{who}_bytes": round(one.bytes_per_position, 2) for who, one in sides} | {
            f"{who}_kl_kept": float(f"{one.kl_kept:.3g}") for who, one in sides
        }
    return {"foreign": figures}
