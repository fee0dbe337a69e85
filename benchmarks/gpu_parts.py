"""The parts of the measurement of one GPU in order of worth, and how the minutes are shared out among them.

A part is a process: a benchmark that writes its figures to a file as they come, or pytest. What bounds each stands in
PARTS alone. Where a script can watch the clock itself it is told its seconds, and ends before it is killed.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

GPU_TESTS = ("tests/gpu", "tests/teacher_dump/test_gpu.py")
SMOKE_TESTS = ("tests/gpu/test_device_batches_gpu.py",)
TEST_PROCESSES = 8
OTHER_SHAPES = "128256x4096,32000x2048,151936x2048,262144x2048,32000x4096,151936x4096,262144x4096"
RESERVE_SECONDS = 4.0  # for the last summary
STARTUP_SECONDS = 12.0  # of a Python with torch on a machine whose host is slow: off what a script is told

# A student of 340M parameters with the vocabulary of Llama 3: the head weighs as much as it ever does.
STUDENT = {
    "vocab-size": 128256,
    "hidden-size": 1024,
    "num-layers": 16,
    "row-length": 2048,
    "batch-rows": 8,
    "micro-batch-rows": 8,
    "top-k": 64,
    "steps": 8,
    "warmup-steps": 3,
    "repeats": 3,
    "dtype": "bfloat16",
}
TINY_STUDENT = {
    **STUDENT,
    **{"vocab-size": 96, "hidden-size": 64, "num-layers": 1, "row-length": 32, "batch-rows": 4, "top-k": 8},
    **{"micro-batch-rows": 2, "steps": 3, "warmup-steps": 1, "repeats": 1, "dtype": "float32"},
}
# 90M parameters, for the ZeRO stages: enough for their buffers to be cut in several pieces.
SMALL_STUDENT = {**STUDENT, "vocab-size": 32000, "hidden-size": 768, "num-layers": 8, "row-length": 1024, "repeats": 1}
TEACHER = {"rows": 256, "rounds": 3, "dtype": "bfloat16", "device": "cuda", "hidden": 2048, "layers": 16}
TEACHER |= {"vocab": 128256, "batch-rows": 4, "row-length": 2048}
TINY_TEACHER = {"hidden": 64, "layers": 1, "vocab": 256, "rows": 4, "row-length": 32, "rounds": 1, "k": 8}


@dataclass(frozen=True)
class Part:
    """A process of the run: what `python -m` runs on a GPU and in a smoke run, and its bound.

    In words `{file}` is where the figures go and `{seconds}` what the script may take. Without smoke words a smoke run
    leaves it out: an earlier part goes the same way. The bound is `share` of what is left when the part begins, not
    below `least` and not above `most` seconds; with less than `least` left it is not run.
    """

    name: str
    measures: str
    words: tuple[str, ...]
    smoke_words: tuple[str, ...]
    share: float
    least: float
    most: float
    reads: Literal["json", "pytest"] = "json"


@dataclass
class Budget:
    """The seconds of a run, from its making on."""

    seconds: float
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._began = self.clock()

    def spent(self) -> float:
        return self.clock() - self._began

    def left(self) -> float:
        """What parts may still take."""
        return max(0.0, self.seconds - RESERVE_SECONDS - self.spent())

    def bound(self, part: Part) -> float | None:
        """Seconds for a part that begins now, or None where it does not fit."""
        left = self.left()
        if left < part.least:
            return None
        return min(part.most, max(part.least, part.share * left))


def options(values: dict[str, Any]) -> tuple[str, ...]:
    return tuple(word for name, value in values.items() for word in (f"--{name}", str(value)))


def tests(chosen: str, paths: tuple[str, ...], *, processes: int) -> tuple[str, ...]:
    """pytest with a line per test, so that one that is broken off says how far it came."""
    spread = ("-n", str(processes), "--dist", "loadgroup") if processes and importlib.util.find_spec("xdist") else ()
    return ("pytest", "-v", "-p", "no:cacheprovider", *spread, "-m", "not slow", "-k", chosen, *paths)


def script(name: str, values: dict[str, Any], *words: str) -> tuple[str, ...]:
    return (f"benchmarks.{name}", *options(values), *words, "--output", "{file}")


WATCHING = ("--seconds", "{seconds}")
KERNELS = "gpu_kernels"
PARTS = (
    Part(
        "tests",
        "correctness: the GPU tests but the compiled ones",
        tests("not compiled", GPU_TESTS, processes=TEST_PROCESSES),
        tests("not compiled", SMOKE_TESTS, processes=0),
        share=0.27,
        least=40,
        most=200,
        reads="pytest",
    ),
    Part(
        "kernels",
        "the kernels and their rivals at N = 8192, V = 128256, D = 2048",
        script(KERNELS, {"shapes": "128256x2048"}, *WATCHING),
        script(KERNELS, {"shapes": "300x8", "worth": 3}, "--smoke", *WATCHING),
        share=0.33,
        least=40,
        most=240,
    ),
    Part(
        "step",
        "distilled step beside label-only steps, ours and of others",
        script("step", {**STUDENT, "rivals": "liger_ce,torch_ce", "host-tokens": 16384}, *WATCHING),
        script("step", {**TINY_STUDENT, "rivals": "liger_ce,torch_ce", "host-tokens": 2048}, *WATCHING),
        share=0.38,
        least=45,
        most=150,
    ),
    Part(
        "dump",
        "the dump over the bare forward of a teacher of 1.35B parameters",
        script("dump", TEACHER),
        script("dump", TINY_TEACHER),
        share=0.4,
        least=40,
        most=120,
    ),
    Part(
        "zero",
        "ZeRO 1, 2, 3 on one rank: agreement of the losses, steps per second",
        script("zero_stages", SMALL_STUDENT),
        script("zero_stages", {**TINY_STUDENT, "stages": "1,3"}),
        share=0.4,
        least=30,
        most=90,
    ),
    Part(
        "step_in_two",
        "the same step in two micro-batches: twice the launches, which a slow host feels first",
        script("step", {**STUDENT, "micro-batch-rows": 4, "repeats": 2, "host-tokens": 1024}, *WATCHING),
        (),
        share=0.4,
        least=35,
        most=60,
    ),
    Part(
        "compiled",
        "correctness: the GPU tests of the compiled backend",
        tests("compiled", GPU_TESTS, processes=4),
        (),
        share=0.5,
        least=30,
        most=180,
        reads="pytest",
    ),
    Part(
        "selector",
        "what selecting half of the positions saves",
        script("selector", {**STUDENT, "repeats": 1}, *WATCHING),
        script("selector", TINY_STUDENT, *WATCHING),
        share=0.6,
        least=40,
        most=90,
    ),
    Part(
        "shapes",
        "the kernels at other shapes",
        script(KERNELS, {"shapes": OTHER_SHAPES, "worth": 1, "repeats": 7}, *WATCHING),
        (),
        share=1.0,
        least=30,
        most=600,
    ),
)
