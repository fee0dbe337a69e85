"""How much a dump costs over the bare forward pass of the same teacher, and what its parts cost.

    python -m benchmarks.dump [--hidden 384] [--layers 6] [--vocab 8192] [--rows 16] [--row-length 256] [--device auto]
                              [--model FOLDER] [--mode top_k] [--k 64] [--output FILE]
    python -m benchmarks.dump --sizes small,middle,large [--output FILE]
    python -m benchmarks.dump --engines hf,vllm [--turns 3] ...   (by a Python that has both)

A random Llama (or a given model) reads rows of random tokens. In turn, several times over: the model's own forward
pass with all logits, in the same batches; and the whole dump of the same rows, from the tokens store to committed
units. The figure is the median over rounds of dump speed / forward speed; on a CPU also by processor time, encoding
and all, which a busy machine does not disturb. The encoder is timed apart, on one thread.
`--sizes` runs several models, each in a process of its own, and gives a list: the smaller a model is beside its
vocabulary, the more the reading of the logits weighs.
`--engines` runs the same model and rows by several engines, each in a process of its own, in turn: `vllm_over_hf` is
the dump's speed by the second over that by the first, the median over turns. Of an engine that gives hidden states
alone (vllm) the bare forward is its own call, without logits. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers

from potstill.storage import RunSpec, StoreReader, StoreWriter, TokensRow, seal_store
from potstill.teacher_dump.batches import packed_batch
from potstill.teacher_dump.config import DumpConfig
from potstill.teacher_dump.dumping import DumpJob
from potstill.teacher_dump.engines.base import TeacherEngine
from potstill.teacher_dump.engines.hf import HfEngine
from potstill.teacher_dump.engines.loading import load_engine
from potstill.teacher_dump.pipeline import Walk

Result = TypeVar("Result")

# The first three as a CPU can carry them (`large` has about the shape of a teacher of 250M parameters); `gpu` has 1.35B
# parameters and Llama 3's vocabulary: take --dtype bfloat16.
SIZES = {
    "small": {"hidden": 384, "layers": 6, "vocab": 8192, "rows": 16, "batch-rows": 4},
    "middle": {"hidden": 768, "layers": 8, "vocab": 32000, "rows": 8, "batch-rows": 2},
    "large": {"hidden": 1024, "layers": 12, "vocab": 32000, "rows": 8, "batch-rows": 2},
    "gpu": {"hidden": 2048, "layers": 16, "vocab": 128256, "rows": 64, "batch-rows": 4, "row-length": 2048},
}
ENCODED_ROWS = 32  # at most, where the encoder is timed by itself
TARGET_TOKENS_PER_S = 100_000  # of a GPU's dump, which the encoder shall keep up with


@dataclass(frozen=True)
class Seconds:
    """Time by the clock, and by the processor over all threads (which other programs on the machine do not change)."""

    wall: float
    cpu: float


@dataclass
class Stage:
    """One benchmark set-up: the stores, the engine and the way to run either side."""

    config: DumpConfig
    engine: TeacherEngine
    tokens: StoreReader
    folder: Path
    batch_rows: int

    def sync(self) -> None:
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, work: Callable[[], Result]) -> tuple[Seconds, Result]:
        self.sync()
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        self.sync()
        return Seconds(time.perf_counter() - wall, time.process_time() - cpu), result

    def bare_forward(self) -> None:
        """The model's own forward pass over all rows, all logits, one batch after another; see the head for vllm."""
        rows = [row for row in self.tokens.rows(range(self.tokens.num_rows)) if isinstance(row, TokensRow)]
        for first in range(0, len(rows), self.batch_rows):
            batch = packed_batch(rows[first : first + self.batch_rows], length=self.tokens.spec.row_length)
            if not isinstance(self.engine, HfEngine):
                self.engine.forward(batch)
                continue
            with torch.no_grad():
                self.engine.model(
                    input_ids=torch.from_numpy(batch.input_ids).to(self.engine.device),
                    position_ids=torch.from_numpy(batch.position_ids).to(self.engine.device),
                    use_cache=False,
                )

    def new_writer(self, name: str, *, rows_per_unit: int | None = None) -> StoreWriter:
        spec = DumpJob(self.config).spec(self.tokens, {"id": "benchmark"})
        spec = replace(spec, rows_per_unit=rows_per_unit or spec.rows_per_unit)
        return StoreWriter.create(self.folder / name, spec, force=True)

    def walk(self) -> Walk:
        job, spec = DumpJob(self.config), self.tokens.spec
        writer = self.new_writer("targets")
        walk = Walk(
            reader=self.tokens,
            writer=writer,
            compute=lambda batch: job.compute(self.engine, batch, spec.vocab_size),
            layout=lambda rows: packed_batch(rows, length=spec.row_length),
            batch_rows=self.batch_rows,
            finish_threads=self.config.finish_threads,
            max_consecutive_failures=1,
            refused_elsewhere=lambda: 0,
            refused_allowed=0,
        )
        walk.run(writer.todo())
        return walk


def set_up(arguments: argparse.Namespace, folder: Path) -> Stage:
    """Make the model and the rows, load the engine."""
    model = arguments.model
    if model is None:
        model = folder / "model"
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=arguments.vocab,
            hidden_size=arguments.hidden,
            intermediate_size=arguments.hidden * 11 // 4,
            num_hidden_layers=arguments.layers,
            num_attention_heads=max(1, arguments.hidden // 64),
            num_key_value_heads=max(1, arguments.hidden // 64),
            max_position_embeddings=arguments.row_length,
            dtype=arguments.dtype,
        )
        # Random weights of a billion parameters take a CPU longer than all that is measured here.
        with torch.device("cuda" if arguments.device == "cuda" else "cpu"):
            made = transformers.LlamaForCausalLM(config)
        made.to(getattr(torch, arguments.dtype)).save_pretrained(model)
        del made
        save_tokenizer(model)
    spec = RunSpec(
        kind="tokens",
        row_length=arguments.row_length,
        # The last unit is encoded when the model is done: two batches, as a share of many, are little of the time.
        rows_per_unit=max(1, min(arguments.rows // 4, 2 * arguments.batch_rows)),
        num_rows=None,
        vocab_size=arguments.vocab,
        tokenizer_digest="benchmark",
    )
    rng = np.random.default_rng(0)
    writer = StoreWriter.create(folder / "tokens", spec)
    half = arguments.row_length // 2
    rows = [
        TokensRow(
            number,
            rng.integers(0, arguments.vocab, arguments.row_length).astype(np.int32),
            np.array([half, arguments.row_length - half], np.int32),
        )
        for number in range(arguments.rows)
    ]
    for unit, first in enumerate(range(0, arguments.rows, spec.rows_per_unit)):
        writer.commit_unit(unit, rows[first : first + spec.rows_per_unit])
    seal_store(folder / "tokens")
    teacher = {key: getattr(arguments, key) for key in ("engine", "dtype", "device", "batch_rows")} | {"model": model}
    if arguments.model is None:
        teacher["check_tokenizer"] = False
    selection = {"mode": arguments.mode, "k": arguments.k}
    config_of_dump = DumpConfig(
        tokens=folder / "tokens", output=folder / "targets", teacher=teacher, selection=selection
    )
    engine = load_engine(config_of_dump.teacher, row_length=arguments.row_length)
    return Stage(config_of_dump, engine, StoreReader(folder / "tokens"), folder, arguments.batch_rows)


def save_tokenizer(folder: Path) -> None:
    """Put one of a single word beside random weights: vLLM loads none without, though it is never asked for a text."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"word": 0}, unk_token="word"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def encoder_rate(stage: Stage) -> float:
    """Tokens per CPU second of one thread from top-k on the host to a committed unit."""
    job, spec = DumpJob(stage.config), stage.tokens.spec
    some = range(min(stage.tokens.num_rows, ENCODED_ROWS))
    rows = [row for row in stage.tokens.rows(some) if isinstance(row, TokensRow)]
    result = job.compute(stage.engine, packed_batch(rows, length=spec.row_length), spec.vocab_size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = float("inf")
    for _ in range(3):
        writer = stage.new_writer("encoded", rows_per_unit=len(rows))
        start = time.thread_time()
        writer.commit_unit(0, [row for row, _ in result.rows().rows])
        best = min(best, time.thread_time() - start)
    torch.set_num_threads(threads)
    return len(rows) * spec.row_length / best


def measure(stage: Stage, rounds: int, *, news: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Forward and dump in turn; the figures by their JSON names. `news` is called with them after each round."""
    if stage.engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the random weights were made there, in float32
    stage.bare_forward()
    stage.walk()
    encoded = encoder_rate(stage)
    forwards: list[Seconds] = []
    dumps: list[Seconds] = []
    stages: list[dict[str, float]] = []
    figures: dict[str, Any] = {}
    for _ in range(rounds):
        forwards.append(stage.timed(stage.bare_forward)[0])
        seconds, walk = stage.timed(stage.walk)
        dumps.append(seconds)
        stages.append(walk.totals.seconds)
        figures = dump_figures(stage, forwards, dumps, stages, encoded=encoded)
        news(figures)
    return figures


def dump_figures(
    stage: Stage, forwards: list[Seconds], dumps: list[Seconds], stages: list[dict[str, float]], *, encoded: float
) -> dict[str, Any]:
    """What the rounds up to now give."""
    num_tokens = stage.tokens.num_tokens
    ratios = [forward.wall / dump.wall for forward, dump in zip(forwards, dumps, strict=True)]
    work = [forward.cpu / dump.cpu for forward, dump in zip(forwards, dumps, strict=True)]
    on_gpu = stage.engine.device.type == "cuda"
    if on_gpu:
        peak = int(torch.cuda.max_memory_allocated())
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "dump_over_forward": round(statistics.median(ratios), 4),
        "dump_over_forward_range": [round(min(ratios), 4), round(max(ratios), 4)],
        "dump_over_forward_cpu_time": None if on_gpu else round(statistics.median(work), 4),
        "forward_tokens_per_s": round(num_tokens / statistics.median(forward.wall for forward in forwards)),
        "dump_tokens_per_s": round(num_tokens / statistics.median(dump.wall for dump in dumps)),
        "encode_tokens_per_core_s": round(encoded),
        "encode_cores_at_100k_tokens_per_s": round(TARGET_TOKENS_PER_S / encoded, 2),
        "peak_bytes": peak,
        "stage_seconds": {name: round(statistics.median(s[name] for s in stages), 4) for name in stages[0]},
    }


def measure_sizes(names: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """One child per size; what they share stands once, and the dump's figure over all is the largest model's."""
    runs = []
    for name in names:
        shape = [word for key, value in SIZES[name].items() for word in (f"--{key}", str(value))]
        shared = [f"--{key}={getattr(arguments, key)}" for key in ("rounds", "device", "dtype", "mode", "k")]
        command = [sys.executable, "-m", "benchmarks.dump", *shape, *shared]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        runs.append({"size": name, **json.loads(done.stdout.splitlines()[-1])})
    slowest = min(run["encode_tokens_per_core_s"] for run in runs)
    return {
        **{key: runs[0][key] for key in ("versions", "date")},
        **{key: runs[-1][key] for key in ("machine", "dump_over_forward", "dump_over_forward_cpu_time", "peak_bytes")},
        "encode_tokens_per_core_s": slowest,
        "encode_cores_at_100k_tokens_per_s": round(TARGET_TOKENS_PER_S / slowest, 2),
        "sizes": runs,
    }


def measure_engines(engines: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """One child per engine and turn, in turn; the ratio of the others' speed to the first's, turn by turn."""
    left_out = ("engines", "turns", "sizes", "output", "engine")
    shared = [f"--{key.replace('_', '-')}={value}" for key, value in vars(arguments).items() if value is not None]
    words = [word for word in shared if word[2:].partition("=")[0].replace("-", "_") not in left_out]
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    for _ in range(arguments.turns):
        for engine in engines:
            command = [sys.executable, "-m", "benchmarks.dump", f"--engine={engine}", *words]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[engine].append(json.loads(done.stdout.splitlines()[-1]))
    first, *others = engines
    figures: dict[str, Any] = {key: runs[first][0][key] for key in ("machine", "versions", "date", "settings")}
    for figure in ("dump_tokens_per_s", "forward_tokens_per_s"):
        by_engine = {engine: [run[figure] for run in found] for engine, found in runs.items()}
        figures[figure] = {engine: round(statistics.median(speeds)) for engine, speeds in by_engine.items()}
        for other in others:
            ratios = [a / b for a, b in zip(by_engine[other], by_engine[first], strict=True)]
            name = f"{other}_over_{first}" + ("" if figure.startswith("dump") else "_bare")
            figures[name] = round(statistics.median(ratios), 4)
            figures[f"{name}_range"] = [round(min(ratios), 4), round(max(ratios), 4)]
    return figures


def measure_one(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one model, with what they were measured on."""
    folder = Path(tempfile.mkdtemp(prefix="potstill_bench_"))
    try:
        stage = set_up(arguments, folder)
        device = stage.engine.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"
        load = f"load {os.getloadavg()[0]:.1f}"
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        beside = ("output", "sizes", "engines", "turns")
        settings = {key: value for key, value in vars(arguments).items() if key not in beside}

        def told(measured: dict[str, Any]) -> dict[str, Any]:
            threads, now = torch.get_num_threads(), os.getloadavg()[0]
            machine = f"{platform.machine()} {name}, {threads} threads, {load} to {now:.1f}"
            head = {"machine": machine, "versions": versions, "date": time.strftime("%Y-%m-%d")}
            return {**head, "settings": settings, **measured}

        return told(measure(stage, arguments.rounds, news=lambda measured: save(told(measured), arguments.output)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save(figures: dict[str, Any], output: str | None) -> None:
    """Write the figures where they are wanted, in one go."""
    if output:
        part = Path(f"{output}.part")
        part.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        os.replace(part, output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    for name, value in (*SIZES["small"].items(), ("row-length", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--mode", default="top_k")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--sizes", help=f"run several models instead: {','.join(SIZES)}, or some of them")
    parser.add_argument("--engine", default="hf")
    parser.add_argument("--engines", help="run several engines in turn instead: hf,vllm")
    parser.add_argument("--turns", type=int, default=3, help="with --engines: processes of each (3)")
    parser.add_argument("--output", help="also write the figures to this file")
    arguments = parser.parse_args()
    if arguments.sizes:
        names = arguments.sizes.split(",")
        if unknown := [name for name in names if name not in SIZES]:
            parser.error(f"no such size: {', '.join(unknown)}; known are {', '.join(SIZES)}")
        figures = measure_sizes(names, arguments)
    elif arguments.engines:
        figures = measure_engines(arguments.engines.split(","), arguments)
    else:
        figures = measure_one(arguments)
    print(json.dumps(figures))
    save(figures, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
