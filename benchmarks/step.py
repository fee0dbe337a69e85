"""Distilled step over the label-only step of the same model, batch and loop, and the share of time waiting for data.

All kinds of runs go through the real trainer (loader, collation, DeepSpeed, optimizer) on synthetic stores, one after
the other, several times; a run gives the median of its steps after a warm-up, and the smallest median per kind counts.
With `--rivals liger_ce,torch_ce` the label-only step runs also with the fused cross-entropy of Liger and of torch in
the student's head: a saving in the loss shows in our own label-only step too, in theirs it does not. Ratios are taken
within each round of all kinds, so that a machine whose speed drifts does not decide, and the file is written after
each run.

`host_ms_per_step` is measured in a run of its own: the time of the driving thread outside of forward, backward and
step, for a batch of --host-tokens tokens of 20 entries each in one micro-batch, and a student so small that a CPU
suffices.

    python -m benchmarks.step [--vocab-size 8192 --hidden-size 256 ...] [--rivals liger_ce,torch_ce] [--seconds 60]
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.fused_ce import Rival
from benchmarks.host_time import host_clock
from benchmarks.step_rivals import RIVALS, find_rival, label_loss_of, without_checkpoints
from potstill.common.config import build_config
from potstill.storage import (
    RunSpec,
    SparseTargets,
    StoreReader,
    StoreWriter,
    TargetsRow,
    TokensRow,
    seal_store,
    token_digest,
)
from potstill.student_train import train
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.run.engine import stop_distributed
from potstill.student_train.run.metrics import read_metrics

ROWS_PER_UNIT = 64
HOST_SECONDS = 20.0  # what the run for the host's time may need where a host is slow
HOST_ROW_LENGTH, HOST_TOP_K, HOST_STEPS = 1024, 20, 13


def made_up_targets(labels: np.ndarray, *, vocab_size: int, top_k: int, rng: np.random.Generator) -> SparseTargets:
    """Targets of one row: `top_k` ids spread over the vocabulary, with Zipf-like masses that sum to 0.95.

    labels int64 [n], the next token, or -1 where there is no target. Each is drawn from its own distribution, as a real
    text would be; the label's column says what the entries say, or the even share of the tail.
    """
    mass = 1.0 / np.arange(1, top_k + 1)
    mass *= 0.95 / mass.sum()
    stride = vocab_size // (top_k + 1)  # >= 1, so that the ids of a position differ
    has_target = labels >= 0
    next_token = labels[has_target]  # [m]
    place = rng.choice(top_k + 1, size=len(next_token), p=np.append(mass, 1.0 - mass.sum()))
    first = np.where(place < top_k, next_token - stride * place, rng.integers(0, vocab_size, len(next_token)))
    ids = (first[:, None] + stride * np.arange(top_k)) % vocab_size  # [m, k]
    hit = ids == next_token[:, None]
    log_mass, log_other = np.log(mass), np.log(0.05 / (vocab_size - top_k))
    label_logprob, label_rank = np.zeros(len(labels), np.float32), np.full(len(labels), 255, np.int32)
    label_logprob[has_target] = np.where(hit.any(1), log_mass[hit.argmax(1)], log_other)
    label_rank[has_target] = np.minimum(np.where(hit.any(1), hit.argmax(1), top_k), 255)
    entropy = -(mass * log_mass).sum() - 0.05 * log_other
    return SparseTargets.build(
        offsets=np.concatenate([[0], np.cumsum(has_target * top_k)]).astype(np.int64),
        ids=ids.reshape(-1).astype(np.int32),
        logprobs=np.tile(log_mass.astype(np.float32), len(next_token)),
        log_tail=np.where(has_target, np.float32(np.log(0.05)), np.float32(0.0)),
        entropy=np.where(has_target, entropy, 0.0).astype(np.float32),
        label_logprob=label_logprob,
        label_rank=label_rank,
        vocab_size=vocab_size,
    )


def synthetic_stores(folder: Path, *, num_rows: int, row_length: int, vocab_size: int, top_k: int) -> None:
    """Random tokens in two documents per row, and top-k targets in whose distributions these tokens are likely."""
    rng = np.random.default_rng(0)
    common = {"row_length": row_length, "rows_per_unit": ROWS_PER_UNIT, "vocab_size": vocab_size}
    common["tokenizer_digest"] = "0" * 64
    half = row_length // 2
    doc_lens = np.array([half, row_length - half], np.int32)
    rows = [TokensRow(n, rng.integers(0, vocab_size, row_length, np.int32), doc_lens) for n in range(num_rows)]
    _write(folder / "tokens", RunSpec(kind="tokens", num_rows=None, **common), rows)
    spec = RunSpec(
        kind="targets",
        num_rows=num_rows,
        input_digest=StoreReader(folder / "tokens").digest,
        selection={"mode": "top_k", "k": top_k},
        teacher={"id": "synthetic", "weights_digest": "0" * 64, "dtype": "float32", "engine": "none"},
        **common,
    )

    def targets(row: TokensRow) -> TargetsRow:
        labels = np.append(row.tokens[1:], -1).astype(np.int64)
        labels[half - 1] = -1
        built = made_up_targets(labels, vocab_size=vocab_size, top_k=top_k, rng=rng)
        return TargetsRow(row.row, token_digest(row.tokens, row.doc_lens), built)

    _write(folder / "targets", spec, [targets(row) for row in rows])


def _write(path: Path, spec: RunSpec, rows: list[Any]) -> None:
    writer = StoreWriter.create(path, spec)
    for unit, first in enumerate(range(0, len(rows), ROWS_PER_UNIT)):
        writer.commit_unit(unit, rows[first : first + ROWS_PER_UNIT])
    seal_store(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes that both student benchmarks share; the defaults suit a CPU of two cores."""
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--row-length", type=int, default=256)
    parser.add_argument("--batch-rows", type=int, default=4)
    parser.add_argument("--micro-batch-rows", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup-steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")


def run_config(
    options: argparse.Namespace, folder: Path, name: str, stage: dict[str, Any], *, log_every: int = 1
) -> TrainConfig:
    """A run of `options.steps` steps of one stage."""
    heads = max(options.hidden_size // 64, 1)
    model = {
        "model_type": "llama",
        "hidden_size": options.hidden_size,
        "intermediate_size": options.hidden_size * 11 // 4,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "tie_word_embeddings": True,
    }
    tree = {
        "run": {"output_dir": str(folder / name), "max_steps": options.steps, "self_check": False},
        "model": {"config": model, "dtype": options.dtype},
        "data": {
            "tokens": str(folder / "tokens"),
            "targets": {"teacher": str(folder / "targets")},
            "global_batch_rows": options.batch_rows,
            "micro_batch_rows": options.micro_batch_rows,
        },
        "objective": {"alpha": 0.9},
        "curriculum": [stage],
        "logging": {"every_steps": log_every},
    }
    return build_config(TrainConfig, tree, source="benchmark")


@dataclass(frozen=True)
class Kind:
    """One kind of run: its stage, and whose label loss it takes (None: ours)."""

    stage: dict[str, Any]
    rival: Rival | None = None


@dataclass
class Repeats:
    """What the runs of one kind gave, a value per run: median seconds per step, share of waiting, peak bytes."""

    medians: list[float] = field(default_factory=list)
    data_wait_shares: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The smallest median: what the machine can do."""
        return min(self.medians)

    @property
    def data_wait_share(self) -> float:
        """Of that run."""
        return self.data_wait_shares[self.medians.index(self.seconds)]


Found = dict[str, Repeats]


def measure(
    options: argparse.Namespace, kinds: Mapping[str, Kind], folder: Path, *, news: Callable[[Found], None]
) -> Found:
    """Run all kinds in turn, `options.repeats` rounds of them or as many runs as `options.seconds` have room for.

    The first two kinds, without which there is no ratio, run in any case; from the second round on there is room left
    for what comes behind. `news` is called after each run with what was found up to there.
    """
    end = time.monotonic() + options.seconds
    num_rows = options.batch_rows * options.steps
    sizes = {"num_rows": num_rows, "row_length": options.row_length, "vocab_size": options.vocab_size}
    synthetic_stores(folder, top_k=options.top_k, **sizes)
    found: Found = {}
    longest = 0.0
    for repeat in range(options.repeats):
        for name, kind in kinds.items():
            began = time.monotonic()
            room = end - began - (HOST_SECONDS if repeat else 0.0)
            if room < longest and len(found) > 1:
                print(f"{name}, round {repeat + 1}: not measured: time", flush=True)
                return found
            run_once(
                run_config(options, folder, f"{name}-{repeat}", kind.stage),
                kind,
                options,
                found.setdefault(name, Repeats()),
            )
            longest = max(longest, time.monotonic() - began)
            news(found)
    return found


def run_once(config: TrainConfig, kind: Kind, options: argparse.Namespace, repeats: Repeats) -> None:
    """One run of the trainer, added to what the others of its kind gave."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with label_loss_of(kind.rival), without_checkpoints():
        train(config)
    records = [record for record in read_metrics(config.run.output_dir) if record["kind"] == "train"]
    records = records[options.warmup_steps :]
    waited = sum(record["data_wait_seconds"] for record in records)
    repeats.medians.append(statistics.median(record["step_seconds"] for record in records))
    repeats.data_wait_shares.append(waited / sum(record["step_seconds"] for record in records))
    if on_gpu:
        repeats.peaks.append(torch.cuda.max_memory_allocated())
    shutil.rmtree(config.run.output_dir)


def ratios(found: Found, above: str, below: str) -> list[float]:
    """Seconds of one kind over those of another, round by round; [] where one of them was not measured."""
    if above not in found or below not in found:
        return []
    pairs = zip(found[above].medians, found[below].medians, strict=False)  # the last round may have been broken off
    return [a / b for a, b in pairs]


def spread(name: str, values: list[float]) -> dict[str, Any]:
    """Median and range of a ratio by round, under a name; {} without values."""
    if not values:
        return {}
    low, high = min(values), max(values)
    return {name: round(statistics.median(values), 4), f"{name}_range": [round(low, 4), round(high, 4)]}


def step_figures(found: Found) -> dict[str, Any]:
    """The figures by their JSON names, as far as they are there."""
    figures: dict[str, Any] = {}
    if {"ce", "kd"} <= set(found):
        figures["kd_step_over_ce_step"] = round(found["kd"].seconds / found["ce"].seconds, 4)
        figures["data_wait_share"] = round(found["kd"].data_wait_share, 5)
    for name, repeats in found.items():
        figures[f"{name}_step_seconds"] = round(repeats.seconds, 5)
    for other in ("ce", *RIVALS):
        figures |= spread(f"kd_over_{other}_by_round", ratios(found, "kd", other))
    figures["step_seconds_by_round"] = {name: [round(x, 5) for x in kind.medians] for name, kind in found.items()}
    if any(kind.peaks for kind in found.values()):
        figures["peak_mib"] = {name: round(max(kind.peaks) / 2**20) for name, kind in found.items()}
    return figures


def host_figures(num_tokens: int, folder: Path) -> dict[str, float]:
    """Median milliseconds per step outside of the engine, and mean ones of waiting for data, from the start on."""
    rows = num_tokens // HOST_ROW_LENGTH
    size = {"batch_rows": rows, "micro_batch_rows": rows, "row_length": HOST_ROW_LENGTH, "vocab_size": 256}
    model = {"hidden_size": 16, "num_layers": 1, "dtype": "float32"}
    options = argparse.Namespace(**size, **model, steps=HOST_STEPS)
    synthetic_stores(folder, num_rows=3 * rows, row_length=HOST_ROW_LENGTH, vocab_size=256, top_k=HOST_TOP_K)
    config = run_config(options, folder, "host", {"targets": "teacher"}, log_every=HOST_STEPS)
    with host_clock() as clock, without_checkpoints():
        train(config)
    [record] = [record for record in read_metrics(config.run.output_dir) if record["kind"] == "train"]
    by_clock, of_core = 1e3 * np.median(clock.steps[2:], axis=0)
    return {
        "host_ms_per_step": round(float(by_clock), 3),
        "host_core_ms_per_step": round(float(of_core), 3),
        "host_wait_ms_per_step": round(1e3 * record["data_wait_seconds"] / HOST_STEPS, 3),
        "host_step_seconds": round(record["step_seconds"], 4),
    }


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of a benchmark of whole steps, checked."""
    add_arguments(parser)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run that would end after this")
    parser.add_argument("--output", type=Path, help="also write the figures to this file, after each run")
    options = parser.parse_args()
    if options.vocab_size <= options.top_k:
        parser.error(f"--vocab-size {options.vocab_size} must be above --top-k {options.top_k}")
    if options.warmup_steps >= options.steps:
        parser.error(f"--warmup-steps {options.warmup_steps} must be below --steps {options.steps}")
    return options


def told(figures: dict[str, Any], options: argparse.Namespace, *, load: float) -> str:
    """Figures, machine, versions and settings as one JSON line, which is also written where it is wanted."""
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "seconds")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    packages = ("torch", "deepspeed", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    machine = f"{platform.machine()} {device}, {torch.get_num_threads()} threads, load {load:.1f} before"
    text = json.dumps(
        {**figures, "machine": machine, "versions": versions, "date": time.strftime("%Y-%m-%d"), "settings": settings}
    )
    if options.output is not None:
        whole = options.output.with_name(f"{options.output.name}.part")
        whole.write_text(text + "\n", encoding="utf-8")
        os.replace(whole, options.output)
    return text


def kinds_of(parser: argparse.ArgumentParser, rivals: str) -> tuple[dict[str, Kind], dict[str, str]]:
    """Ours and the rivals that are asked for and here, and what each rival does or that it is not here."""
    kinds, methods = {"ce": Kind({}), "kd": Kind({"targets": "teacher"})}, {}
    for name in filter(None, rivals.split(",")):
        if name not in RIVALS:
            parser.error(f"--rivals: no such rival: {name}; known are {', '.join(RIVALS)}")
        rival = find_rival(name)
        methods[name] = "not in this Python, or no GPU" if rival is None else rival.method
        if rival is not None:
            kinds[name] = Kind({}, rival)
    return kinds, methods


def main() -> None:
    """Run and print one JSON line."""
    load, began = os.getloadavg()[0], time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host-tokens", type=int, default=65536, help="of the step whose host time is measured")
    parser.add_argument("--rivals", default="", help=f"label losses of others: {','.join(RIVALS)}, or some of them")
    options = parse(parser)
    if options.host_tokens < HOST_ROW_LENGTH:
        parser.error(f"--host-tokens {options.host_tokens} must be at least one row of {HOST_ROW_LENGTH}")
    kinds, methods = kinds_of(parser, options.rivals)
    figures: dict[str, Any] = {"rivals": methods} if methods else {}

    def news(found: Found) -> None:
        told({**step_figures(found), **figures}, options, load=load)

    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, kinds, Path(folder), news=news)
    figures = {**step_figures(found), **figures}
    if time.monotonic() - began + HOST_SECONDS < options.seconds:
        with tempfile.TemporaryDirectory() as folder:
            figures |= host_figures(options.host_tokens, Path(folder))
    stop_distributed()
    print(told(figures, options, load=load))


if __name__ == "__main__":
    main()
