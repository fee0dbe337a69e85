"""The GPU kernels beside eager, torch.compile, Liger's and torch's own fused CE and torch.topk, in one table.

    PYTHONPATH=src python -m benchmarks.gpu_kernels --output FILE.json   (one GPU, under ten minutes)
    PYTHONPATH=src python -m benchmarks.gpu_kernels --smoke              (CPU, tiny: shows that it runs)
    ... --shapes 128256x2048,32000x2048 --worth 1 --seconds 60           (some shapes, the best variants, a minute)

For N = 8192 and k = 64: milliseconds (median), the fraction of the measured copy bandwidth or product rate, peak
memory over the inputs, the error of the gradient against float64, on the kept ids and off them; for some, launches and
the time that the GPU was busy. The most telling variants of a shape come first, and the file is written after each.
Variants that fail or do not fit are named in the table, and the exit code is 1 if one failed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_rivals import Problem, Variant, linear_variants, logits_variants, teacher_variants

Shape = tuple[int, int]
# (V, D); the first is the design's.
SHAPES: tuple[Shape, ...] = (
    (128256, 2048),
    (128256, 4096),
    (32000, 2048),
    (32000, 4096),
    (151936, 2048),
    (151936, 4096),
    (262144, 2048),
    (262144, 4096),
)
SMOKE_SHAPES: tuple[Shape, ...] = ((300, 8), (513, 16))
TINY_OPS = 2000
Step = Callable[[], object]


@dataclass
class Row:
    """One line of the table; fraction is of the copy bandwidth (logits, teacher) or the product rate (linear)."""

    what: str
    vocabulary: int
    width: int
    variant: str
    computes: str
    milliseconds: float | None = None
    fraction: float | None = None
    peak_mib: float | None = None
    error_kept: float | None = None
    error_rest: float | None = None
    launches: int | None = None
    busy_ms: float | None = None
    note: str = ""


class Device:
    """Times and memory of one device; on a CPU (smoke run) by the wall clock and without memory."""

    def __init__(self, *, smoke: bool, repeats: int) -> None:
        self.name = "cpu" if smoke else "cuda"
        self.repeats = repeats
        self.copy_bytes_per_second, self.flops_per_second = self._ceilings(8 if smoke else 8192)
        self.tiny_op_microseconds = self._tiny_op()

    def milliseconds(self, step: Step) -> float:
        """Median of `repeats` after two warm calls."""
        for _ in range(2):
            step()
        times = []
        for _ in range(self.repeats):
            if self.name == "cpu":
                start = time.perf_counter()
                step()
                times.append(1e3 * (time.perf_counter() - start))
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            step()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        return sorted(times)[len(times) // 2]

    def peak_mib(self, step: Step) -> float:
        if self.name == "cpu":
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def free(self) -> None:
        if self.name == "cuda":
            torch.cuda.empty_cache()

    def _ceilings(self, side: int) -> tuple[float, float]:
        """Bytes per second of a copy (read and written) and FLOP per second of a bf16 product on random data."""
        kind: dict[str, Any] = {"device": self.name, "dtype": torch.bfloat16}
        source = torch.randn(side, side * 32, **kind)
        target = torch.empty_like(source)
        copy_seconds = 1e-3 * self.milliseconds(lambda: target.copy_(source))
        a, b = torch.randn(side, side, **kind), torch.randn(side, side, **kind)
        product_seconds = 1e-3 * self.milliseconds(lambda: a @ b)
        return 2 * source.nbytes / copy_seconds, 2 * side**3 / product_seconds

    def _tiny_op(self) -> float:
        """Microseconds that the host takes per operation on one number: what a launch costs on this machine."""
        value = torch.zeros(1, device=self.name)
        best = float("inf")
        for _ in range(3):
            self._wait()
            start = time.perf_counter()
            for _ in range(TINY_OPS):
                value.add_(1.0)
            self._wait()
            best = min(best, 1e6 * (time.perf_counter() - start) / TINY_OPS)
        return best

    def _wait(self) -> None:
        if self.name == "cuda":
            torch.cuda.synchronize()

    def launches_and_busy(self, step: Step) -> tuple[int, float]:
        """Kernels (copies and fills too) that one call starts, and the milliseconds that they take by themselves."""
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.name == "cuda" else [])]
        with profile(activities=kinds) as seen:
            step()
            self._wait()
        events = seen.events() or []
        kernels = [
            event
            for event in events
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        ]
        return len(kernels), 1e-3 * sum(event.time_range.elapsed_us() for event in kernels)


class Table:
    """Measures variants into rows; keeps going after one that fails, and names those it has no time for."""

    def __init__(self, device: Device, *, seconds: float, save: Callable[[list[Row]], None]) -> None:
        self.device, self.failed, self.save = device, False, save
        self.rows: list[Row] = []
        self.end = time.monotonic() + seconds

    def measure(self, problem: Problem, variants: Sequence[Variant]) -> None:
        """All variants of one problem, in the order of their worth."""
        for variant in sorted(variants, key=lambda variant: variant.worth):
            row = Row(variant.what, problem.vocabulary, problem.width, variant.name, variant.computes)
            self.rows.append(row)
            if variant.step is None:
                row.note = variant.note
            elif time.monotonic() + variant.needs_seconds > self.end:
                row.note = "not measured: time"
            else:
                self._try(row, variant, problem)
            print(line(row), flush=True)
            self.save(self.rows)

    def _try(self, row: Row, variant: Variant, problem: Problem) -> None:
        try:
            self._fill(row, variant, problem)
        except torch.OutOfMemoryError:
            row.note = "out of memory"
        except Exception as failure:
            traceback.print_exc()
            row.note, self.failed = f"failed: {type(failure).__name__}", True
        self.device.free()

    def _fill(self, row: Row, variant: Variant, problem: Problem) -> None:
        assert variant.step is not None
        row.milliseconds = self.device.milliseconds(variant.step)
        row.peak_mib = self.device.peak_mib(variant.step)
        seconds = 1e-3 * row.milliseconds
        if row.what == "linear":
            row.fraction = problem.product_flops / seconds / self.device.flops_per_second
        elif row.what == "teacher hidden":
            row.fraction = problem.product_flops / 3 / seconds / self.device.flops_per_second
        else:
            # The bytes of the least traffic the two passes need, so that a wasteful variant scores low.
            reads = problem.teacher_bytes if row.what == "teacher" else problem.loss_bytes
            row.fraction = reads / seconds / self.device.copy_bytes_per_second
        self.save(self.rows)
        if variant.profiled:
            row.launches, row.busy_ms = self.device.launches_and_busy(variant.step)
        if variant.errors is not None:
            row.error_kept, row.error_rest = variant.errors()


def line(row: Row) -> str:
    def number(value: float | None, form: str) -> str:
        return format(value, form) if value is not None else "-"

    return (
        f"{row.what:<15}{row.vocabulary:>7}{row.width:>6}  {row.variant:<42}{number(row.milliseconds, '.3f'):>10}"
        f"{number(row.fraction, '.2f'):>7}{number(row.peak_mib, '.0f'):>8}{number(row.launches, 'd'):>9}"
        f"{number(row.busy_ms, '.3f'):>9}{number(row.error_kept, '.1e'):>9}{number(row.error_rest, '.1e'):>9}"
        f"  {row.computes:<16}{row.note}"
    )


HEADER = (
    f"{'what':<15}{'V':>7}{'D':>6}  {'variant':<42}{'ms':>10}{'frac':>7}{'MiB':>8}{'launches':>9}{'busy ms':>9}"
    f"{'err kept':>9}{'err rest':>9}  computes"
)


def versions(device: Device) -> dict[str, str]:
    """What the figures were measured on."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    name = torch.cuda.get_device_name() if device.name == "cuda" else "cpu (smoke run: no figure of a GPU)"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "copy_TB_per_second": f"{device.copy_bytes_per_second / 1e12:.3f}",
        "product_TFLOP_per_second": f"{device.flops_per_second / 1e12:.1f}",
        "host_us_per_tiny_op": f"{device.tiny_op_microseconds:.1f}",
    }


def run(table: Table, shapes: Sequence[Shape], *, tokens: int, k: int, worth: int) -> None:
    """All shapes in turn, while there is time."""
    for vocabulary, width in shapes:
        if time.monotonic() > table.end:
            print(f"V = {vocabulary}, D = {width}: not measured: time", flush=True)
            continue
        problem = Problem.make(tokens=tokens, vocabulary=vocabulary, width=width, k=k, device=table.device.name)
        # What is given as logits does not depend on the width of the head.
        from_logits = width == min(other for size, other in shapes if size == vocabulary)
        variants = linear_variants(problem)
        if from_logits:
            variants += logits_variants(problem) + teacher_variants(problem)
        table.measure(problem, [variant for variant in variants if variant.worth <= worth])
        del problem, variants
        table.device.free()


def read_shapes(text: str) -> tuple[Shape, ...]:
    """`VxD,VxD` as pairs. Raises argparse.ArgumentTypeError with the word that is none."""
    found = []
    for word in text.split(","):
        try:
            vocabulary, width = (int(number) for number in word.split("x"))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} is no shape; expected VxD, as 128256x2048") from None
        found.append((vocabulary, width))
    return tuple(found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the same code on the CPU with tiny shapes")
    parser.add_argument("--output", type=Path, help="JSON file, written anew after each variant")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=480.0, help="after this no variant is begun")
    parser.add_argument("--shapes", type=read_shapes, help="VxD,VxD,... (8 shapes, the design's first)")
    parser.add_argument("--worth", type=int, default=9, help="variants up to this rank, 0 (ours alone) to 9 (all)")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("no CUDA device; --smoke runs the same code on the CPU")
    return arguments


def main() -> int:
    arguments = parse()
    began = time.monotonic()
    smoke = arguments.smoke
    device = Device(smoke=smoke, repeats=2 if smoke else arguments.repeats)
    about = versions(device)

    def save(rows: list[Row]) -> None:
        if arguments.output is not None:
            whole = arguments.output.with_name(f"{arguments.output.name}.part")
            text = json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1)
            whole.write_text(text + "\n", encoding="utf-8")
            os.replace(whole, arguments.output)

    table = Table(device, seconds=arguments.seconds - (time.monotonic() - began), save=save)
    print(json.dumps(about), HEADER, sep="\n", flush=True)
    shapes = arguments.shapes or (SMOKE_SHAPES if smoke else SHAPES)
    run(table, shapes, tokens=16 if smoke else 8192, k=8 if smoke else 64, worth=arguments.worth)
    ours: dict[str, Any] = {
        f"{row.what.replace(' ', '_')}_ms_v{row.vocabulary}_d{row.width}": row.milliseconds
        for row in table.rows
        if row.variant == "potstill"
    }
    print(json.dumps({"measured_on": about["device"], **ours}))
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
