"""The GPU kernels beside eager, torch.compile, a chunked linear CE of Liger's shape and torch.topk, in one table.

    PYTHONPATH=src python -m benchmarks.gpu_kernels --output benchmarks/results  (one GPU, under ten minutes)
    PYTHONPATH=src python -m benchmarks.gpu_kernels --smoke                      (CPU, tiny: shows that it runs)

For N = 8192 and k = 64: milliseconds (median), the fraction of the measured copy bandwidth or product rate, peak
memory over the inputs, and the error of the gradient against float64, on the kept ids and off them. Variants that
fail or do not fit are named in the table, and the exit code is 1 if one failed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.gpu_rivals import Problem, linear_variants, logits_variants, teacher_variants

VOCABULARIES = (32000, 128256, 151936, 262144)
WIDTHS = (2048, 4096)
Step = Callable[[], object]


@dataclass
class Row:
    """One line of the table; fraction is of the copy bandwidth (logits, teacher) or the product rate (linear)."""

    what: str
    vocabulary: int
    width: int
    variant: str
    milliseconds: float | None = None
    fraction: float | None = None
    peak_mib: float | None = None
    error_kept: float | None = None
    error_rest: float | None = None
    note: str = ""


class Device:
    """Times and memory of one device; on a CPU (smoke run) by the wall clock and without memory."""

    def __init__(self, *, smoke: bool, repeats: int) -> None:
        self.name = "cpu" if smoke else "cuda"
        self.repeats = repeats
        self.copy_bytes_per_second, self.flops_per_second = self._ceilings(8 if smoke else 8192)

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
        kind = {"device": self.name, "dtype": torch.bfloat16}
        source = torch.randn(side, side * 32, **kind)
        target = torch.empty_like(source)
        copy_seconds = 1e-3 * self.milliseconds(lambda: target.copy_(source))
        a, b = torch.randn(side, side, **kind), torch.randn(side, side, **kind)
        product_seconds = 1e-3 * self.milliseconds(lambda: a @ b)
        return 2 * source.nbytes / copy_seconds, 2 * side**3 / product_seconds


class Table:
    """Measures variants into rows; keeps going after one that fails, and skips when time is up."""

    def __init__(self, device: Device, *, seconds: float) -> None:
        self.device, self.rows, self.failed = device, [], False
        self.end = time.monotonic() + seconds

    def measure(self, what: str, problem: Problem, variants: dict[str, tuple[Step, Step | None]]) -> None:
        for name, (step, error) in variants.items():
            row = Row(what, problem.vocabulary, problem.width, name)
            self.rows.append(row)
            if time.monotonic() > self.end and not name.startswith("potstill"):
                row.note = "skipped: time is up"
                continue
            try:
                self._fill(row, step, error, problem)
            except torch.OutOfMemoryError:
                row.note = "out of memory"
            except Exception as failure:
                traceback.print_exc()
                row.note, self.failed = f"failed: {type(failure).__name__}", True
            self.device.free()
            print(line(row), flush=True)

    def _fill(self, row: Row, step: Step, error: Step | None, problem: Problem) -> None:
        row.milliseconds = self.device.milliseconds(step)
        row.peak_mib = self.device.peak_mib(step)
        seconds = 1e-3 * row.milliseconds
        if row.what == "linear":
            row.fraction = problem.product_flops / seconds / self.device.flops_per_second
        else:
            # The bytes of the least traffic the two passes need, so that a wasteful variant scores low.
            reads = problem.teacher_bytes if row.what == "teacher" else problem.loss_bytes
            row.fraction = reads / seconds / self.device.copy_bytes_per_second
        if error is not None:
            row.error_kept, row.error_rest = error()


def line(row: Row) -> str:
    def number(value: float | None, form: str) -> str:
        return format(value, form) if value is not None else "-"

    return (
        f"{row.what:<8}{row.vocabulary:>7}{row.width:>6}  {row.variant:<26}{number(row.milliseconds, '.3f'):>10}"
        f"{number(row.fraction, '.2f'):>7}{number(row.peak_mib, '.0f'):>8}{number(row.error_kept, '.1e'):>9}"
        f"{number(row.error_rest, '.1e'):>9}  {row.note}"
    )


HEADER = f"{'what':<8}{'V':>7}{'D':>6}  {'variant':<26}{'ms':>10}{'frac':>7}{'MiB':>8}{'err kept':>9}{'err rest':>9}"


def versions(device: Device) -> dict[str, str]:
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
    }


def run(table: Table, *, smoke: bool) -> None:
    tokens = 16 if smoke else 8192
    vocabularies, widths = ((300, 513), (8, 16)) if smoke else (VOCABULARIES, WIDTHS)
    k = 8 if smoke else 64
    for vocabulary in vocabularies:
        for width in widths:
            problem = Problem.make(tokens=tokens, vocabulary=vocabulary, width=width, k=k, device=table.device.name)
            if width == widths[0]:
                table.measure("logits", problem, logits_variants(problem))
                table.measure("teacher", problem, teacher_variants(problem))
            table.measure("linear", problem, linear_variants(problem))
            del problem
            table.device.free()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the same code on the CPU with tiny shapes")
    parser.add_argument("--output", type=Path, help="folder for gpu_kernels.json and gpu_kernels.txt")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=480.0, help="after this, rivals are skipped")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("no CUDA device; --smoke runs the same code on the CPU")
    device = Device(smoke=arguments.smoke, repeats=2 if arguments.smoke else arguments.repeats)
    table = Table(device, seconds=arguments.seconds)
    about = versions(device)
    print(json.dumps(about), HEADER, sep="\n", flush=True)
    run(table, smoke=arguments.smoke)
    text = "\n".join([json.dumps(about), HEADER, *(line(row) for row in table.rows)])
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "gpu_kernels.txt").write_text(text + "\n")
        full = json.dumps({"about": about, "rows": [asdict(row) for row in table.rows]}, indent=1)
        (arguments.output / "gpu_kernels.json").write_text(full + "\n")
    ours = {
        f"{row.what}_ms_v{row.vocabulary}_d{row.width}": row.milliseconds
        for row in table.rows
        if row.variant == "potstill"
    }
    print(text, json.dumps({"measured_on": about["device"], **ours}), sep="\n")
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
