"""`python -m benchmarks [NAME ...]`: run the benchmarks one after another and print the JSON line each ends with.

Without names, the ones that need no GPU. Each script can be run by itself (`python -m benchmarks.loader --help`).
`--gpu` is one command for all that is measured on a GPU, its tests included, against the goals of the design, in as
many minutes as there are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

GPU_OUTPUT = Path("gpu-results")
MINUTES = (3, 30)


@dataclass(frozen=True)
class Benchmark:
    """One script of this folder: what figure it prints, and what keeps it out of a run of all of them."""

    script: str
    measures: str
    needs_gpu: bool = False
    by_itself: str = ""  # why it is not run without being named
    arguments: tuple[str, ...] = ()


BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark("store_codec", "bytes per token, encode and decode speed, fidelity, beside plain layouts"),
    Benchmark("loader", "first batch of a huge store, throughput, memory, planning", arguments=("--minutes", "1")),
    Benchmark(
        "scale", "what grows with a store of 100 billion tokens, local and on S3", by_itself="hours, 20 GB of disk"
    ),
    Benchmark("scale_server", "the server of scale by hand: counts requests and bytes", by_itself="until it is ended"),
    Benchmark("cpu_kernels", "the loss on a CPU beside eager autograd and torch.compile"),
    Benchmark("gpu_kernels", "the kernels beside eager, compiled and chunked torch on one GPU", needs_gpu=True),
    Benchmark("dump", "the dump over the bare forward pass of the same teacher"),
    Benchmark("step", "the distilled step over the label-only step; waiting for data"),
    Benchmark("zero_stages", "a student under ZeRO 1, 2 and 3 on one rank: agreement of the losses, steps per second"),
    Benchmark("checkpoint_cost", "digests of a checkpoint's files beside writing and loading them"),
    Benchmark("proposals", "draws from powers of the teacher: squared error and bytes at equal draws"),
    Benchmark("selector", "what selecting half of the positions saves"),
    Benchmark("plan_demo", "the planner's figures beside what the demo's dump did cost", by_itself="on your stores"),
    Benchmark("init_rules", "initial weights by width: spread and mean over seeds", by_itself="an hour"),
    Benchmark("demo_spread", "the demo's comparison over five seeds, against its goals", by_itself="ten minutes"),
    Benchmark(
        "engine_students", "students from stores of engines hf and vllm, over seeds", by_itself="needs vLLM beside"
    ),
    Benchmark("methods", "a preset against label-only and plain KD over several seeds", by_itself="on your stores"),
)


def last_json(output: str) -> dict[str, object] | None:
    """The JSON object on the last line that holds one."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue
            return found if isinstance(found, dict) else None
    return None


def run(entry: Benchmark) -> bool:
    """Run one script as its own process; print its JSON line, or the end of what it said if it failed."""
    command = [sys.executable, "-m", f"benchmarks.{entry.script}", *entry.arguments]
    began = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    seconds = time.monotonic() - began
    figures = last_json(done.stdout)
    if done.returncode != 0 or figures is None:
        print(f"{entry.script}: failed with code {done.returncode} after {seconds:.0f}s", flush=True)
        print("\n".join(f"  {line}" for line in done.stdout.splitlines()[-20:]), flush=True)
        return False
    print(json.dumps({"benchmark": entry.script, "seconds": round(seconds, 1), **figures}), flush=True)
    return True


def on_gpu(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """All that is measured on a GPU; refused where there is none."""
    from benchmarks.gpu_all import run_all
    from benchmarks.gpu_summary import card_and_driver

    minutes, output = arguments.minutes, arguments.output or GPU_OUTPUT
    if not MINUTES[0] <= minutes <= MINUTES[1]:
        parser.error(f"--minutes {minutes:g} must be from {MINUTES[0]} to {MINUTES[1]}")
    if not arguments.smoke and card_and_driver() is None:
        import torch  # slow to start: nvidia-smi answers first where there is one

        if not torch.cuda.is_available():
            parser.error(f"torch {torch.__version__} sees no CUDA device; --smoke runs the same parts on a CPU, tiny")
    return run_all(output, minutes=minutes, smoke=arguments.smoke)


def main() -> int:
    """Run what was asked for; 0 only if every script ended well."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(
            f"  {entry.script:<16}{entry.measures}"
            + (" (needs a GPU)" if entry.needs_gpu else f" (by itself: {entry.by_itself})" if entry.by_itself else "")
            for entry in BENCHMARKS
        ),
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="scripts to run, below")
    parser.add_argument("--gpu", action="store_true", help="GPU tests and GPU benchmarks, the most telling first")
    parser.add_argument("--minutes", type=float, default=9.0, help="with --gpu: what all may take, 3 to 30 (9)")
    parser.add_argument("--smoke", action="store_true", help="with --gpu: the same way through on a CPU, tiny")
    parser.add_argument("--output", type=Path, help=f"with --gpu: folder of summary and log ({GPU_OUTPUT})")
    arguments = parser.parse_args()
    names = arguments.names
    if arguments.gpu:
        if names:
            parser.error(f"--gpu runs a fixed set; remove {', '.join(names)}")
        return on_gpu(parser, arguments)
    if arguments.smoke or arguments.output is not None:
        parser.error("--smoke and --output belong to --gpu; a script by itself has its own (--help)")
    unknown = sorted(set(names) - {entry.script for entry in BENCHMARKS})
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}")
    everywhere = {entry.script for entry in BENCHMARKS if not (entry.needs_gpu or entry.by_itself)}
    chosen = [entry for entry in BENCHMARKS if entry.script in (names or everywhere)]
    failed = [entry.script for entry in chosen if not run(entry)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
