"""The demo's comparison over more seeds, with goals: labels, plain KD and distilled with the selector.

    python -m benchmarks.demo_spread --output potstill-demo
    python -m benchmarks.demo_spread --output potstill-demo --seeds 11,12,13,14,15

Teacher, small model and stores are those of the demo in --output, made if they are missing; `--seeds` are those of the
students, their initial weights and order of rows. What is done is not done again. Printed are a table and the goals;
the last line is JSON. `gap` is the held-out loss of labels minus that of distilled, `selector_gain` that of plain KD
minus distilled, both paired by seed. --result keeps Markdown and JSON, a section for each set of seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.about import about
from potstill.common.errors import UserError
from potstill.common.spread import Spread, differences, is_gain
from potstill.common.text_tables import table
from potstill.launch.demo.report import ARM_NAMES, reference_losses
from potstill.launch.demo.run import demo_folder, run_jobs
from potstill.launch.demo.sizes import ARMS, FULL, QUICK, DemoSize, store_jobs, student_jobs
from potstill.student_train.run.metrics import read_metrics

LABELS_SD_GOAL, GAP_MIN_GOAL, GAP_SD_GOAL = 0.03, 0.05, 0.03
ANSWERS = {True: "yes", False: "no", None: "cannot be told"}
Losses = Mapping[str, Sequence[float]]  # arm -> held-out loss by seed


def run_seeds(root: Path, size: DemoSize, seeds: Sequence[int]) -> None:
    """Make what is missing of the demo's stores and of the students of these seeds."""
    with demo_folder(root, size):
        run_jobs(root, size, [*store_jobs(size, root), *student_jobs(size, root, seeds)])


def curve(root: Path, arm: str, seed: int) -> dict[int, float]:
    """Held-out loss by step of one run, its last step among them."""
    records = [record for record in read_metrics(root / "runs" / f"{arm}-{seed}") if record["kind"] == "eval"]
    return {int(record["step"]): float(record["heldout_loss"]) for record in records}


def figures(losses: Losses) -> dict[str, Any]:
    """What is measured against the goals, and what else the losses say. All in nats."""
    gaps = differences(losses["labels"], losses["distilled"])
    gains = differences(losses["kd"], losses["distilled"])
    gap, gain, labels = Spread.of(gaps), Spread.of(gains), Spread.of(losses["labels"])
    return {
        "labels_sd": round(labels.sd, 4),
        "gap_mean": round(gap.mean, 4),
        "gap_min": round(min(gaps), 4),
        "gap_sd": round(gap.sd, 4),
        "kd_gap_mean": round(Spread.of(differences(losses["labels"], losses["kd"])).mean, 4),
        "selector_gain_mean": round(gain.mean, 4),
        "selector_gain_sd": round(gain.sd, 4),
        "selector_gain_interval": [round(end, 4) for end in gain.interval()],
        "selector_worth_it": ANSWERS[is_gain(gains)],
        "means": {arm: round(Spread.of(found).mean, 4) for arm, found in losses.items()},
        "losses": {arm: [round(loss, 6) for loss in found] for arm, found in losses.items()},
    }


def goals(found: Mapping[str, Any]) -> dict[str, bool]:
    """Each goal in words, and whether it is met."""
    return {
        f"labels_sd {found['labels_sd']:.4f} <= {LABELS_SD_GOAL}": found["labels_sd"] <= LABELS_SD_GOAL,
        f"gap_min {found['gap_min']:.4f} >= {GAP_MIN_GOAL}": found["gap_min"] >= GAP_MIN_GOAL,
        f"gap_sd {found['gap_sd']:.4f} <= {GAP_SD_GOAL}": found["gap_sd"] <= GAP_SD_GOAL,
    }


def seeds_table(seeds: Sequence[int], losses: Losses) -> str:
    """A line for each seed, then mean and standard deviation."""
    columns = {ARM_NAMES[arm]: list(losses[arm]) for arm in ARMS}
    columns["labels - distilled"] = differences(losses["labels"], losses["distilled"])
    columns["plain KD - distilled"] = differences(losses["kd"], losses["distilled"])
    rows = [(str(seed), *(f"{column[at]:.4f}" for column in columns.values())) for at, seed in enumerate(seeds)]
    spreads = [Spread.of(column) for column in columns.values()]
    rows.append(("mean", *(f"{spread.mean:.4f}" for spread in spreads)))
    rows.append(("sd", *(f"{spread.sd:.4f}" for spread in spreads)))
    return table(["seed", *columns], rows)


def curves_table(curves: Mapping[str, Mapping[int, float]]) -> str:
    """Mean held-out loss over the seeds at each evaluated step."""
    steps = sorted(next(iter(curves.values())))
    rows = [(ARM_NAMES[arm], *(f"{found[step]:.4f}" for step in steps)) for arm, found in curves.items()]
    return table(["step", *map(str, steps)], rows)


def measure(root: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Read the finished runs: figures, goals, mean curves and the n-grams' losses, as plain values."""
    runs = {arm: [curve(root, arm, seed) for seed in seeds] for arm in ARMS}
    found = figures({arm: [run[max(run)] for run in of_arm] for arm, of_arm in runs.items()})
    ngrams = reference_losses(root)
    return {
        "benchmark": "demo_spread",
        **found,
        "seeds": list(seeds),
        "goals": {goal: "met" if met else "missed" for goal, met in goals(found).items()},
        "bigram": round(ngrams.bigram, 4),
        "unigram": round(ngrams.unigram, 4),
        "curves": {
            arm: {step: round(Spread.of([run[step] for run in of_arm]).mean, 4) for step in of_arm[0]}
            for arm, of_arm in runs.items()
        },
        **about(),
    }


def section(result: Mapping[str, Any]) -> str:
    """The result of one set of seeds as text: for the terminal and, in a code block, for the Markdown."""
    curves = {arm: {int(step): loss for step, loss in found.items()} for arm, found in result["curves"].items()}
    low, high = result["selector_gain_interval"]
    return "\n".join(
        [
            seeds_table(result["seeds"], result["losses"]),
            "",
            f"Held-out loss over the run, mean over the seeds (bigram {result['bigram']:.4f}, unigram "
            f"{result['unigram']:.4f}):",
            curves_table(curves),
            "",
            f"Was the selector worth it? {result['selector_worth_it']}: {result['selector_gain_mean']:+.4f} nats over "
            f"plain KD, 95 % interval of the mean {low:+.4f} to {high:+.4f}.",
            *(f"goal {goal}: {answer}" for goal, answer in result["goals"].items()),
        ]
    )


def keep(path: Path, result: Mapping[str, Any]) -> None:
    """Put the result into the JSON beside `path`, under its seeds, and write the Markdown of all sets of seeds."""
    beside = path.with_suffix(".json")
    kept: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    kept[",".join(map(str, result["seeds"]))] = result
    beside.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# The demo over five seeds an arm",
        "",
        "Held-out loss in nats per token of clean text, after training on text of which a part is noise. `gap` is "
        "labels minus distilled, paired by seed: same initial weights, same number of steps. Teacher, small model and "
        "stores are made once.",
        "",
    ]
    for seeds, found in kept.items():
        packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        lines += [
            f"## Seeds {seeds}",
            "",
            f"{found['date']}, commit {found['commit']}, {found['machine']}, {packages}. Not measured on a GPU.",
            "",
            f"    python -m benchmarks.demo_spread --output FOLDER --seeds {seeds} --result {path.name}",
            "",
            f"```text\n{section(found)}\n```",
            "",
        ]
    notes = path.with_suffix(".notes.md")
    if notes.is_file():
        lines.append(notes.read_text(encoding="utf-8").rstrip() + "\n")
    path.write_text("\n".join(lines), encoding="utf-8")


def parse_seeds(text: str) -> list[int]:
    """`1,2,3` as numbers; at least two, none twice, or there is no spread."""
    seeds = [int(part) for part in text.split(",")]
    if len(seeds) < 2 or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected two or more different seeds, such as 1,2,3,4,5")
    return seeds


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing and print what came out; 0 whether the goals are met or not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=parse_seeds, default=[1, 2, 3, 4, 5], help="of the students (default 1,2,3,4,5)"
    )
    parser.add_argument("--output", type=Path, default=Path("potstill-demo"), help="the demo's folder (%(default)s)")
    parser.add_argument("--noise", type=float, help="as of `potstill demo`")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, as of `potstill demo`")
    parser.add_argument("--result", type=Path, help="also keep the result in this Markdown file and in JSON beside it")
    options = parser.parse_args(words)
    size = QUICK if options.quick else FULL
    if options.noise is not None:
        size = replace(size, noise=options.noise)
    run_seeds(options.output, size, options.seeds)
    result = measure(options.output, options.seeds)
    print(section(result))
    if options.result is not None:
        keep(options.result, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"benchmarks.demo_spread: error: {error}")
