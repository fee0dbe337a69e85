"""Synthetic stores of any number of units: real records, data files of no bytes, one real unit to stand for all.

A store `tokens` and a store `targets` of the same rows stand in one folder, with a small teacher's model and the
templates beside them. One unit, in the middle, has rows of a few tokens and real bytes: what a worker of a dump is
measured on, so that its teacher's time is none.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.scale_template import SYNTHETIC, TEMPLATES, Template, unlikely_numbers
from potstill.storage import (
    RunSpec,
    SparseTargets,
    StoreReader,
    StoreWriter,
    TargetsRow,
    TokensRow,
    read_spec,
    seal_store,
)
from potstill.storage.files.commit import CommitRecord
from potstill.storage.files.unit_file import encode_unit

if TYPE_CHECKING:
    from potstill.teacher_dump import DumpConfig

VOCAB, ENTRIES = 32_000, 32
SHORT_TOKENS = 16  # of a row of the unit that workers make
BLOCK_UNITS = 512  # written by one call of a process
PROCESSES = 2
TINY = {"num_units": 2, "rows_per_unit": 4, "row_length": 16}  # of the stores that steps get ready with
DISTINCT_ROWS = 8  # a batch holds no two alike


@dataclass(frozen=True)
class Sizes:
    """What the stores of one measurement have in common."""

    root: Path
    num_units: int
    rows_per_unit: int
    row_length: int

    @property
    def num_rows(self) -> int:
        return self.num_units * self.rows_per_unit

    @property
    def open_unit(self) -> int:
        """The unit that workers make."""
        return self.num_units // 2


def token_row(number: int, place: int, num_tokens: int) -> TokensRow:
    """Row `number`, with tokens by its `place` in its unit."""
    ranks = np.random.default_rng(place % DISTINCT_ROWS).exponential(VOCAB / 8, num_tokens)
    return TokensRow(number, (ranks % VOCAB).astype(np.int32), np.array([num_tokens], np.int32))


def row_targets(tokens: NDArray[np.int32], *, seed: int) -> SparseTargets:
    """Targets with ENTRIES entries a token, the label first, and none at the last token."""
    rng, count = np.random.default_rng(seed), len(tokens) - 1
    steps = rng.integers(1, VOCAB // ENTRIES, (count, ENTRIES))
    ids = (tokens[1:, None] + np.cumsum(steps, 1) - steps[:, :1]) % VOCAB
    shares = np.sort(rng.exponential(1.0, (count, ENTRIES)) ** 2, axis=1)[:, ::-1] + 1e-6
    logprobs = np.log(0.95 * shares / shares.sum(1, keepdims=True))
    whole: dict[str, Any] = {"offsets": np.append(np.arange(count + 1) * ENTRIES, count * ENTRIES), "vocab_size": VOCAB}
    side: dict[str, Any] = {
        "log_tail": np.append(np.full(count, np.log(0.05)), 0.0),
        "entropy": np.append(rng.uniform(0.5, 3.0, count), 0.0),
        "label_logprob": np.append(logprobs[:, 0], 0.0),
        "label_rank": np.zeros(count + 1),
    }
    types = {"label_rank": np.int32}
    columns: dict[str, Any] = {name: values.astype(types.get(name, np.float32)) for name, values in side.items()}
    return SparseTargets.build(
        **whole, ids=ids.ravel().astype(np.int32), logprobs=logprobs.ravel().astype(np.float32), **columns
    )


def tokens_spec(sizes: Sizes) -> RunSpec:
    return RunSpec(
        kind="tokens",
        row_length=sizes.row_length,
        rows_per_unit=sizes.rows_per_unit,
        num_rows=sizes.num_rows,
        vocab_size=VOCAB,
        tokenizer_digest="made up",
    )


def dump_config(sizes: Sizes, tokens: str, output: str) -> DumpConfig:
    """What a worker of the dump is given; the teacher is small, and knows the rows' ids."""
    from potstill.teacher_dump import DumpConfig

    teacher: Any = {"model": str(sizes.root / "teacher"), "check_tokenizer": False, "batch_rows": 64, "device": "cpu"}
    selection: Any = {"mode": "top_k", "k": ENTRIES}
    return DumpConfig(tokens=tokens, output=output, teacher=teacher, selection=selection, seal=False)


def make_teacher(folder: Path, *, row_length: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=row_length, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)


def template_of(kind: str, spec: RunSpec) -> Template:
    """One encoded unit of full rows under numbers that do not compress."""
    numbers = unlikely_numbers(spec.rows_per_unit, seed=1)
    rows: list[Any] = []
    known: dict[int, SparseTargets] = {}
    stats = dict.fromkeys(spec.stats, 0.0)
    for place, number in enumerate(numbers.tolist()):
        tokens = token_row(number, place, spec.row_length)
        if kind == "targets":
            if place % DISTINCT_ROWS not in known:
                known[place % DISTINCT_ROWS] = row_targets(tokens.tokens, seed=place)
            rows.append(TargetsRow(number, tokens.digest(), known[place % DISTINCT_ROWS], stats))
        else:
            rows.append(tokens)
    return Template.of(encode_unit(rows, spec=spec, unit=0, id_map=None), numbers)


def row_statistics(spec: RunSpec, unit: int, num_targets: int) -> dict[str, NDArray[np.float64]]:
    """Statistics of the rows of a unit, as different from row to row as those of a real dump."""
    rng = np.random.default_rng(unit)
    values = {name: rng.gamma(9.0, 0.25, spec.rows_per_unit).astype(np.float32) for name in spec.stats}
    if "num_targets" in values:
        values["num_targets"] = np.full(spec.rows_per_unit, num_targets // spec.rows_per_unit, np.float32)
    return {name: column.astype(np.float64) for name, column in values.items()}


def write_units(path: Path, template_folder: Path, spec: RunSpec, units: range, skip: int) -> None:
    """Records of these units, and data files of the right size without bytes; nothing of the unit `skip`."""
    template, size = Template.load(template_folder), (template_folder / "data").stat().st_size
    for unit in units:
        if unit == skip:
            continue
        name = f"u{unit:07d}{SYNTHETIC}"
        record = CommitRecord(
            unit=unit,
            file=name,
            num_bytes=size,
            sha256=hashlib.sha256(name.encode()).hexdigest(),
            first_row=unit * spec.rows_per_unit,
            batch_table=np.array(
                [[b.offset, b.length, b.crc32, b.num_rows] for b in template.batches_of(unit)], np.int64
            ),
            num_tokens=np.array(template.num_tokens, np.int64),
            num_entries=np.array(template.num_entries, np.int64),
            num_targets=template.num_targets,
            stats=row_statistics(spec, unit, template.num_targets),
            time_seconds=1.7e9 + 60.0 * unit,
            extra={"figures": {"excluded_mass": 0.0, "positions": float(sum(template.num_tokens))}, "seconds": 59.5},
        )
        with open(path / "units" / name, "wb") as file:
            file.truncate(size)
        (path / "units" / f"u{unit:07d}.json").write_bytes(record.to_bytes(spec.fingerprint))


def write_store(sizes: Sizes, name: str, spec: RunSpec) -> None:
    """The store `name` with all units but the one that workers make."""
    path, folder = sizes.root / name, sizes.root / TEMPLATES / name
    spec = StoreWriter.create(path, spec).spec
    template_of(spec.kind, spec).save(folder)
    blocks = [range(u, min(u + BLOCK_UNITS, sizes.num_units)) for u in range(0, sizes.num_units, BLOCK_UNITS)]
    if len(blocks) == 1:
        write_units(path, folder, spec, blocks[0], sizes.open_unit)
        return
    with ProcessPoolExecutor(PROCESSES) as pool:
        for written in [pool.submit(write_units, path, folder, spec, block, sizes.open_unit) for block in blocks]:
            written.result()


def make_stores(sizes: Sizes) -> None:
    """A sealed tokens store, and its targets store with one unit to be made."""
    from potstill.teacher_dump.dumping import DumpJob
    from potstill.teacher_dump.identity import computing_dtype, describe, load_config

    tokens, targets = sizes.root / "tokens", sizes.root / "targets"
    make_teacher(sizes.root / "teacher", row_length=sizes.row_length)
    write_store(sizes, "tokens", tokens_spec(sizes))
    writer = StoreWriter.create(tokens, tokens_spec(sizes))
    numbers = writer.unit_rows(sizes.open_unit)
    short = min(SHORT_TOKENS, sizes.row_length)
    writer.commit_unit(sizes.open_unit, [token_row(number, place, short) for place, number in enumerate(numbers)])
    seal_store(tokens, fast=True)
    config = dump_config(sizes, str(tokens), str(targets))
    model = load_config(config.teacher)
    teacher = dict(describe(config.teacher, model, dtype=computing_dtype(config.teacher, model)))
    write_store(sizes, "targets", DumpJob(config).spec(StoreReader(tokens), teacher))


def open_again(sizes: Sizes) -> None:
    """Take out the unit that a worker has made."""
    for path in (sizes.root / "targets" / "units").glob(f"u{sizes.open_unit:07d}*"):
        path.unlink()


def complete(sizes: Sizes) -> None:
    """Commit the unit that workers make, without a teacher."""
    reader = StoreReader(sizes.root / "tokens")
    path = sizes.root / "targets"
    writer = StoreWriter.create(path, read_spec(path))
    rows = []
    for row in reader.tokens_rows(list(writer.unit_rows(sizes.open_unit))):
        stats = dict.fromkeys(writer.spec.stats, 1.0)
        rows.append(TargetsRow(row.row, row.digest(), row_targets(row.tokens, seed=row.row), stats))
    writer.commit_unit(sizes.open_unit, rows, extra={"figures": {}, "seconds": 1.0})


def put_rows(sizes: Sizes, rows: NDArray[np.int64]) -> None:
    """Write the bytes of these rows into the data files on disk, which have none."""
    for name in ("tokens", "targets"):
        template = Template.load(sizes.root / TEMPLATES / name)
        ends = np.cumsum([batch.num_rows for batch in template.batches])
        for row in map(int, rows):
            unit, place = divmod(row, sizes.rows_per_unit)
            path = sizes.root / name / "units" / f"u{unit:07d}{SYNTHETIC}"
            if unit == sizes.open_unit:
                continue
            batch = template.batches[int(np.searchsorted(ends, place, side="right"))]
            with open(path, "r+b") as file:
                os.pwrite(file.fileno(), template.piece(unit, batch.offset, batch.offset + batch.length), batch.offset)
