"""How near the planner comes to a real dump: calibrate, dump the demo's rows, compare; several times over.

    potstill demo --output FOLDER
    python -m benchmarks.plan_demo --demo FOLDER [--rounds 3] [--output benchmarks/results/plan_demo.md]

Each round plans the dump of the demo's teacher over the demo's rows from a fresh calibration with two workers side by
side, then dumps them with two workers, and sets the plan beside what it did cost. The last line is one JSON object;
its ratios are actual / planned, the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from potstill.common.errors import UserError
from potstill.launch.calibrate import calibrate, run_workers
from potstill.launch.demo.sizes import DUMP_WORKERS, FULL
from potstill.launch.plan import PlanConfig, compare, format_comparison, make_plan
from potstill.storage import StoreReader, seal_store
from potstill.teacher_dump.config import DumpConfig

Comparison = list[tuple[str, str, str, str]]


def one_round(demo: Path, folder: Path, *, kept_entries: int) -> tuple[Comparison, float, float]:
    """The plan beside the dump; wall seconds planned, starts included, and those of the workers' processes."""
    selection = {"mode": "top_p_k", "p": 0.98, "k": kept_entries}
    teacher = {"model": demo / "models" / "teacher", "batch_rows": 16}
    output = folder / "targets"
    dump = DumpConfig.model_validate(
        {"tokens": demo / "data" / "train", "output": output, "teacher": teacher, "selection": selection, "seal": False}
    )
    (folder / "calibration").mkdir(parents=True)
    measured = calibrate(dump, folder=folder / "calibration", num_workers=DUMP_WORKERS)
    tokens = StoreReader(dump.tokens)
    settings = PlanConfig.model_validate(
        {
            "teacher": demo / "models" / "teacher",
            "tokens": tokens.num_tokens,
            "row_length": tokens.spec.row_length,
            "selection": selection,
            "num_gpus": DUMP_WORKERS,
        }
    )
    plan = make_plan(settings, measured=measured)
    seconds = run_workers(dump, folder=folder, num_workers=DUMP_WORKERS)
    seal_store(output)
    return compare(plan, str(output)), plan.dump_seconds, max(seconds)


def report(rounds: Sequence[tuple[Comparison, float, float]], *, machine: str) -> str:
    """Markdown: what was run, and the table of each round."""
    lines = [
        "# The plan beside the demo's dump",
        "",
        machine,
        "",
        "    python -m benchmarks.plan_demo --demo FOLDER --output benchmarks/results/plan_demo.md",
        "",
        "Two workers on one machine, one thread each. `wall time` is from the first record to the last; `with starts` "
        "from the start of the workers' processes to their end.",
    ]
    for number, (rows, planned, actual) in enumerate(rounds, start=1):
        whole = ("with starts", f"{planned:.1f}s", f"{actual:.1f}s", f"{actual / planned:.3f}")
        lines += [
            "",
            f"Round {number}:",
            "",
            *(f"    {line}" for line in format_comparison([*rows, whole]).splitlines()),
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="folder of a finished `potstill demo`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kept-entries", type=int, default=FULL.kept_entries)
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    if not (options.demo / "models" / "teacher" / "config.json").is_file():
        raise UserError(f"{options.demo} holds no finished demo; make one: potstill demo --output {options.demo}")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    before = os.getloadavg()[0]
    rounds = []
    with tempfile.TemporaryDirectory(prefix="potstill_plan_demo_") as temporary:
        for number in range(options.rounds):
            folder = Path(temporary) / str(number)
            rounds.append(one_round(options.demo, folder, kept_entries=options.kept_entries))
    machine = (
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, load {before:.1f} before, "
        f"torch {torch.__version__}, transformers {transformers.__version__}. Not measured on a GPU."
    )
    text = report(rounds, machine=machine)
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    ratios = {row[0]: [float(made[0][at][3]) for made in rounds] for at, row in enumerate(rounds[0][0])}
    ratios["with starts"] = [round(actual / planned, 3) for _, planned, actual in rounds]
    figures = {name.replace(" ", "_").replace(",", ""): statistics.median(found) for name, found in ratios.items()}
    print(json.dumps({"machine": machine, "rounds": options.rounds, "actual_over_planned": figures}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"benchmarks.plan_demo: error: {error}")
