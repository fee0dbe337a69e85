"""Does each method do here what its paper says? Runs the arms of a claim over seeds and judges by the claim's own rule.

    python -m benchmarks.claims --all --data ../shared/data --work runs/claims --output benchmarks/results
    python -m benchmarks.claims --claim salt --seeds 11,12,13
    python -m benchmarks.claims --list

Texts, teachers and stores are made once below --work, and each run once for its configuration and seed: what is done
is not done again, and the command started again continues. A run made by other source is made again (--any-source
takes it).
The last line is JSON: for each claim whether it holds, the effect of its headline and the interval.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims.base import SCALES, Bench, Claim, Scale
from benchmarks.claims.report import keep, result_of, result_text
from benchmarks.claims.runs import run_arms, run_setting
from benchmarks.claims.table import CLAIMS, find_claim, head
from benchmarks.claims.tell import tell
from potstill.common.errors import UserError

QUICK_SEEDS = (1, 2)
# Sizes and rates were chosen on others: what was chosen on a seed is judged without it.
SEEDS = (11, 12, 13, 14, 15)


def parse_seeds(text: str) -> tuple[int, ...]:
    """`1,2,3` as numbers; at least two, none twice, or there is no spread."""
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = ()
    if len(seeds) < 2 or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected two or more different seeds, such as 1,2,3,4,5")
    return seeds


def check_data(claim: Claim, bench: Bench) -> None:
    """See that the folders of text are there. Raises UserError naming the first that is missing."""
    for name in claim.needs:
        if not (bench.data / name).is_dir():
            raise UserError(
                f"claim {claim.name} reads {bench.data / name}, which is not there; name its parent with --data"
            )


def run_claim(claim: Claim, bench: Bench, *, parallel: int, any_source: bool, output: Path | None) -> dict[str, Any]:
    """Build, run, judge, tell and keep one claim. Raises UserError of a job that fails."""
    check_data(claim, bench)
    for jobs in claim.build(bench):
        run_setting(jobs, bench, parallel)
    arms = claim.arms(bench)
    runs = run_arms(bench, arms, parallel, any_source=any_source)
    outcome = claim.judge(bench, runs)
    print(result_text(claim, outcome), flush=True)
    result = result_of(claim, bench, runs, outcome)
    if output is not None:
        keep(output, claim, result, outcome)
    return result


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--claim", choices=CLAIMS, action="append", help="run this one; may be given again")
    what.add_argument("--all", action="store_true", help="run every claim")
    what.add_argument("--list", action="store_true", help="say what each claim is, and run nothing")
    what.add_argument("--tell", action="store_true", help="write what claims.json holds into the pages")
    parser.add_argument("--seeds", type=parse_seeds, help="of the students (11,12,13,14,15; with --quick 1,2)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes that show the machinery; says nothing of a method"
    )
    parser.add_argument("--scale", choices=SCALES, help="cpu: for two cores (default); gpu: for one GPU")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of real texts (%(default)s)")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/claims"), help="folder of stores and runs (%(default)s)"
    )
    parser.add_argument("--output", type=Path, help="also keep claims.json, claims.md and the plots in this folder")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, each with one thread on a CPU (2)")
    parser.add_argument("--any-source", action="store_true", help="take finished runs that other source made")
    options = parser.parse_args(words)
    if options.quick and options.scale not in (None, "quick"):
        parser.error("--quick is a scale of its own; remove --scale")
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Run what was asked for; 0 whether the claims hold or not."""
    options = parse(words)
    if options.list:
        for name in CLAIMS:
            print(f"{name}\n\n{head(name)}\n")
        return 0
    if options.tell:
        print("\n".join(f"written: {page}" for page in tell()) or "nothing to change")
        return 0
    scale: Scale = "quick" if options.quick else options.scale or "cpu"
    seeds = options.seeds or (QUICK_SEEDS if scale == "quick" else SEEDS)
    bench = Bench(work=options.work.resolve(), data=options.data.resolve(), scale=scale, seeds=seeds)
    told = {}
    for name in CLAIMS if options.all else options.claim:
        result = run_claim(
            find_claim(name), bench, parallel=options.parallel, any_source=options.any_source, output=options.output
        )
        told[name] = {key: result[key] for key in ("pass", "effect", "unit", "interval", "seeds")}
    print(json.dumps({"benchmark": "claims", "scale": scale, "claims": told}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"benchmarks.claims: error: {error}")
