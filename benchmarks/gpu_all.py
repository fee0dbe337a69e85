"""All that is measured on one GPU, in one command: the GPU tests, then each benchmark at the size of a GPU.

    python -m benchmarks --gpu --output benchmarks/results     (one CUDA device, at most half an hour)
    python -m benchmarks --gpu --smoke --output FOLDER         (CPU, tiny: the same way through, figures mean nothing)

Each part is a process of its own with a limit on its time; one that fails does not stop the others. Each leaves one
JSON file with machine, versions and date in the folder; a table compares the figures with the goals of the design.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
GPU_TESTS = ("tests/gpu", "tests/teacher_dump/test_gpu.py")

# A student of 340M parameters with the vocabulary of Llama 3: the head weighs as much as it ever does.
STUDENT = {
    "vocab-size": 128256,
    "hidden-size": 1024,
    "num-layers": 16,
    "row-length": 2048,
    "batch-rows": 8,
    "micro-batch-rows": 4,
    "top-k": 64,
    "steps": 12,
    "warmup-steps": 4,
    "repeats": 2,
    "dtype": "bfloat16",
}
TINY_STUDENT = {
    **STUDENT,
    **{"vocab-size": 96, "hidden-size": 64, "num-layers": 1, "row-length": 32, "batch-rows": 4, "top-k": 8},
    **{"micro-batch-rows": 2, "steps": 3, "warmup-steps": 1, "repeats": 1, "dtype": "float32"},
}
TINY_DUMP = {"hidden": 64, "layers": 1, "vocab": 256, "rows": 4, "row-length": 32, "rounds": 1, "k": 8}
# fp32 gradient of a [128256, 2048] head, and 0.75 GiB.
LINEAR_PEAK_MIB = 4 * 128256 * 2048 / 2**20 + 768


def options(values: dict[str, Any]) -> tuple[str, ...]:
    return tuple(word for name, value in values.items() for word in (f"--{name}", str(value)))


@dataclass(frozen=True)
class Part:
    """A process: what `python -m` runs on a GPU and in a smoke run, its limit, and the file that it leaves.

    `{output}` in a word is the folder of the results.
    """

    name: str
    words: tuple[str, ...]
    smoke_words: tuple[str, ...]
    limit_seconds: float
    file: str


@dataclass(frozen=True)
class Outcome:
    """How a part ended: its figures, or why there are none."""

    part: Part
    seconds: float
    figures: Figures | None
    failure: str | None


@dataclass(frozen=True)
class Goal:
    """A figure of the design: where it is found, and its bound."""

    what: str
    part: str
    value: Callable[[Figures], float]
    bound: float
    at_least: bool = False

    def verdict(self, found: float) -> str:
        return "met" if (found >= self.bound if self.at_least else found <= self.bound) else "MISSED"


def benchmark(name: str, values: dict[str, Any], tiny: dict[str, Any], *, limit_seconds: float) -> Part:
    """A script of this folder that writes its figures to --output, with its options on a GPU and in a smoke run."""
    file = f"{name}_gpu.json"
    words, smoke = (
        (f"benchmarks.{name}", *options(chosen), "--output", f"{{output}}/{file}") for chosen in (values, tiny)
    )
    return Part(name, words, smoke, limit_seconds, file)


PARTS = (
    Part("tests", ("pytest", "-q", *GPU_TESTS), ("pytest", "-q", *GPU_TESTS), 420, "gpu_tests.json"),
    Part(
        "gpu_kernels",
        ("benchmarks.gpu_kernels", "--seconds", "330", "--output", "{output}"),
        ("benchmarks.gpu_kernels", "--smoke", "--seconds", "0", "--output", "{output}"),
        540,
        "gpu_kernels.json",
    ),
    benchmark(
        "dump",
        {"sizes": "gpu", "dtype": "bfloat16", "device": "cuda", "rounds": 5},
        TINY_DUMP,
        limit_seconds=240,
    ),
    benchmark("step", STUDENT, {**TINY_STUDENT, "host-tokens": 2048}, limit_seconds=240),
    benchmark("selector", STUDENT, TINY_STUDENT, limit_seconds=300),
)


def kernel_row(figures: Figures, what: str, key: str, *, variant: str = "potstill") -> float:
    """A cell of the kernels' table at the shape that the design names. Raises LookupError without it."""
    for row in figures["rows"]:
        if (row["what"], row["vocabulary"], row["width"], row["variant"]) == (what, 128256, 2048, variant):
            if row[key] is None:
                raise LookupError(row["note"])
            return float(row[key])
    raise LookupError(f"no {what} of {variant} at this shape")


def half_of_kernels(figures: Figures) -> float:
    half = kernel_row(figures, "linear", "milliseconds", variant="potstill, half the tokens")
    return half / kernel_row(figures, "linear", "milliseconds")


GOALS = (
    Goal("dump over the bare forward", "dump", lambda f: f["dump_over_forward"], 0.97, at_least=True),
    Goal("distilled step over the label-only step", "step", lambda f: f["kd_step_over_ce_step"], 1.05),
    Goal("driving thread outside of the engine, ms", "step", lambda f: f["host_ms_per_step"], 2.0),
    Goal("half the tokens: head over all", "selector", lambda f: f["half_selected_head_over_all"], 0.6),
    Goal("half the tokens: fused linear over all", "gpu_kernels", half_of_kernels, 0.6),
    Goal("H200: from logits, ms", "gpu_kernels", lambda f: kernel_row(f, "logits", "milliseconds"), 1.6),
    Goal("H200: fused linear, ms", "gpu_kernels", lambda f: kernel_row(f, "linear", "milliseconds"), 18.5),
    Goal("fused linear, peak MiB", "gpu_kernels", lambda f: kernel_row(f, "linear", "peak_mib"), LINEAR_PEAK_MIB),
)


def machine() -> dict[str, str]:
    """What the tests ran on; the benchmarks say it themselves."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    return {
        "machine": f"{platform.machine()} {name}",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, cuda {torch.version.cuda}",
        "date": time.strftime("%Y-%m-%d"),
    }


def count_tests(output: str) -> dict[str, int]:
    """The counts of pytest's last line."""
    lines = [line for line in output.splitlines() if re.search(r"\bin [\d.]+s", line)]
    found = re.findall(r"(\d+) (passed|failed|skipped|errors?)", lines[-1]) if lines else []
    return {kind: int(number) for number, kind in found}


def run_part(part: Part, output: Path, *, smoke: bool) -> Outcome:
    """Run one part to its end or its limit. What it says goes to `output/NAME.log` until it has ended well."""
    words = [word.format(output=output) for word in (part.smoke_words if smoke else part.words)]
    result, log = output / part.file, output / f"{part.name}.log"
    result.unlink(missing_ok=True)  # an older figure must not stand for this run
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if smoke else {})}
    began = time.monotonic()
    with open(log, "w", encoding="utf-8") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=part.limit_seconds)
            failure = f"ended with code {code}" if code else None
        except subprocess.TimeoutExpired:
            failure = f"was stopped at its limit of {part.limit_seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.monotonic() - began
    text = log.read_text(encoding="utf-8", errors="replace")
    if part.name == "tests":
        counts = count_tests(text)
        if failure is None and not smoke and not counts.get("passed"):
            failure = "ran no test: all were skipped"
        result.write_text(json.dumps({**machine(), "seconds": round(seconds, 1), **counts}) + "\n", encoding="utf-8")
    if failure is None and not result.is_file():
        failure = f"left no {result.name}"
    if failure is not None:
        return Outcome(part, seconds, None, failure)
    log.unlink()
    return Outcome(part, seconds, json.loads(result.read_text(encoding="utf-8")), None)


def run_parts(parts: Sequence[Part], output: Path, *, smoke: bool) -> list[Outcome]:
    """Run all parts, whatever becomes of each, and say how each ended."""
    outcomes = []
    for part in parts:
        print(f"{part.name}: at most {part.limit_seconds:.0f} s ...", flush=True)
        outcome = run_part(part, output, smoke=smoke)
        outcomes.append(outcome)
        told = "done" if outcome.failure is None else f"FAILED: it {outcome.failure}; see {part.name}.log"
        print(f"{part.name}: {told}, {outcome.seconds:.0f} s", flush=True)
    return outcomes


def goals_table(outcomes: Sequence[Outcome], *, smoke: bool) -> str:
    """One line per goal: bound, figure, verdict."""
    figures = {outcome.part.name: outcome.figures for outcome in outcomes}
    lines = [f"{'goal':<42}{'bound':>10}{'measured':>11}  verdict"]
    for goal in GOALS:
        bound = f"{'>=' if goal.at_least else '<='} {goal.bound:.4g}"
        measured, verdict = "-", f"not measured: {goal.part} failed"
        found = figures.get(goal.part)
        if found is not None:
            try:
                value = goal.value(found)
                measured, verdict = f"{value:.4g}", "smoke: no meaning" if smoke else goal.verdict(value)
            except LookupError as error:
                verdict = f"not measured: {error}"
        lines.append(f"{goal.what:<42}{bound:>10}{measured:>11}  {verdict}")
    return "\n".join(lines)


def run_all(output: Path, *, smoke: bool) -> int:
    """Run everything, write `gpu_summary.txt`; 1 if a part failed. A goal that is missed is told and no failure."""
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    about = machine()
    print(" | ".join(about.values()), flush=True)
    outcomes = run_parts(PARTS, output, smoke=smoke)
    failed = [f"{outcome.part.name} {outcome.failure}" for outcome in outcomes if outcome.failure is not None]
    table = goals_table(outcomes, smoke=smoke)
    ending = "failed: " + "; ".join(failed) if failed else "every part ended well"
    text = "\n".join([" | ".join(about.values()), table, ending])
    (output / "gpu_summary.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{table}\n{ending}; figures in {output}", flush=True)
    return 1 if failed else 0
