"""The CPU path of the sparse loss beside eager autograd and torch.compile: time and peak memory.

    python -m benchmarks.cpu_kernels [--save]

Loss and gradient at N = 512, V = 32000, k = 64, D = 256, float32: from given logits, and from hidden states
and a head. The last line is JSON: time_over_eager, time_over_compile (from logits), peak_bytes_over_eager and
half_selected_over_all (from hidden states), and the same for the other way in.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from potstill.kernels.loss import linear_sparse_loss, sparse_loss
from potstill.kernels.topk import select_top_k, teacher_topk
from potstill.kernels.types import SparseTargetTensors

RESULTS = Path(__file__).parent / "results"
ALPHA = 0.5
Call = Callable[[], object]


def eager_loss(
    logits: Tensor, ids: Tensor, log_p: Tensor, log_tail: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """Tail-bucket forward KL and CE as one would write them: log_softmax, gather, log(1 - sum)."""
    log_q = torch.log_softmax(logits / temperature, 1).gather(1, ids)
    log_rest = torch.log1p(-log_q.exp().sum(1).clamp_max(1 - 1e-7))
    kd = (log_p.exp() * (log_p - log_q)).sum(1) + log_tail.exp() * (log_tail - log_rest)
    ce = torch.nn.functional.cross_entropy(logits, labels)
    return ALPHA * temperature**2 * kd.mean() + (1 - ALPHA) * ce


def teacher(num_tokens: int, vocab_size: int, k: int) -> SparseTargetTensors:
    logits = torch.randn(num_tokens, vocab_size, generator=torch.Generator().manual_seed(1)) * 3
    return select_top_k(teacher_topk(logits=logits, k=k, temperatures=(2.0,)), k)


def variants(shape: argparse.Namespace, temperature: float) -> dict[str, Call]:
    """Name -> one step (loss and gradients) on fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    targets = teacher(shape.tokens, shape.vocabulary, shape.k)
    ids = targets.ids.view(shape.tokens, shape.k).long()
    tail = targets.log_tail if temperature == 1.0 else targets.log_tail_at[temperature]
    log_p = targets.logprobs.view(shape.tokens, shape.k) / temperature
    log_p = log_p - log_p.logsumexp(1, keepdim=True) + torch.log1p(-tail.exp())[:, None]
    labels = torch.randint(0, shape.vocabulary, (shape.tokens,), generator=generator)
    hidden = torch.randn(shape.tokens, shape.width, generator=generator).requires_grad_()
    head = (torch.randn(shape.vocabulary, shape.width, generator=generator) * 0.1).requires_grad_()
    logits = (hidden @ head.t()).detach().requires_grad_()
    half = (torch.arange(shape.tokens) % 2).float()
    arguments = {"targets": targets, "labels": labels, "alpha": ALPHA, "temperature": temperature}
    naive = (ids, log_p, tail, labels, temperature)
    compiled = torch.compile(eager_loss)

    def linear(loss: Callable[..., Tensor]) -> Call:
        return lambda: torch.autograd.grad(loss(hidden @ head.t(), *naive), (hidden, head))

    def ours(weights: Tensor | None) -> object:
        loss, _ = linear_sparse_loss(hidden=hidden, weight=head, token_weights=weights, **arguments)
        return torch.autograd.grad(loss, (hidden, head))

    return {
        "logits eager": lambda: torch.autograd.grad(eager_loss(logits, *naive), logits),
        "logits compile": lambda: torch.autograd.grad(compiled(logits, *naive), logits),
        "logits ours": lambda: torch.autograd.grad(sparse_loss(logits=logits, **arguments)[0], logits),
        "linear eager": linear(eager_loss),
        "linear compile": linear(compiled),
        "linear ours": lambda: ours(None),
        "linear ours, half": lambda: ours(half),
    }


def seconds_of(calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """Best of `repeats`, the variants in turns so that a busy machine slows them alike."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def peak_bytes(call: Call) -> int:
    """How far resident memory rises above its level before the call (Linux), after one warm call."""
    call()

    def field(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = field("VmRSS")
    call()
    return max(1, field("VmHWM") - before)


def peak_in_child(name: str, temperature: float, shape: argparse.Namespace) -> int:
    """A process per variant: an allocator that kept memory from another would hide its peak."""
    command = [sys.executable, "-m", "benchmarks.cpu_kernels", "--peak", name, str(temperature)]
    for option in ("tokens", "vocabulary", "width", "k"):
        command += [f"--{option}", str(getattr(shape, option))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return int(done.stdout.split()[-1])


def machine() -> dict[str, str]:
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": model[0].split(":", 1)[1].strip() if model else platform.processor(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def figures(times: dict[str, float], peaks: dict[str, int]) -> dict[str, float]:
    ratios = {
        "time_over_eager": times["logits ours"] / times["logits eager"],
        "time_over_compile": times["logits ours"] / times["logits compile"],
        "peak_bytes_over_eager": peaks["linear ours"] / peaks["linear eager"],
        "half_selected_over_all": times["linear ours, half"] / times["linear ours"],
        "linear_time_over_eager": times["linear ours"] / times["linear eager"],
        "linear_time_over_compile": times["linear ours"] / times["linear compile"],
        "logits_peak_bytes_over_eager": peaks["logits ours"] / peaks["logits eager"],
    }
    return {name: round(value, 3) for name, value in ratios.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cpu_kernels.json")
    parser.add_argument("--peak", nargs=2, metavar=("VARIANT", "T"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.peak:
        name, temperature = arguments.peak
        print(peak_bytes(variants(arguments, float(temperature))[name]))
        return
    out: dict[str, object] = {}
    for temperature in (2.0, 1.0):
        times = seconds_of(variants(arguments, temperature), arguments.repeats)
        peaks = {
            name: peak_in_child(name, temperature, arguments)
            for name in ("logits eager", "logits ours", "linear eager", "linear ours")
        }
        print(f"T = {temperature:g}: {'variant':<18} {'ms':>8} {'ns/logit':>9} {'peak MB':>8}")
        for name, seconds in times.items():
            each = 1e9 * seconds / (arguments.tokens * arguments.vocabulary)
            peak = f"{peaks[name] / 1e6:8.0f}" if name in peaks else f"{'':>8}"
            print(f"         {name:<18} {1e3 * seconds:8.0f} {each:9.1f} {peak}")
        out[f"milliseconds_t{temperature:g}"] = {n: round(1e3 * s, 1) for n, s in times.items()}
        out[f"peak_bytes_t{temperature:g}"] = peaks
    result = figures(times, peaks) | {"temperature": 1.0}
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        shape = {name: getattr(arguments, name) for name in ("tokens", "vocabulary", "width", "k")}
        text = json.dumps({"machine": machine(), "shape": shape, **result, **out}, indent=1)
        (RESULTS / "cpu_kernels.json").write_text(text + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
