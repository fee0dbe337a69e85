"""A preset against label-only training and plain KD on your stores: same student, steps and schedule, several seeds.

    python -m benchmarks.methods --preset salt --tokens data/train --heldout data/heldout --targets teacher=targets \
        --scores slm=scores --model-config configs/small --steps 400 --seeds 1,2,3,4,5 --work runs/methods

What the methods are held to, each in a setting of its own: `python -m benchmarks.claims`. Here the arms are `labels`,
`kd` (plain KD of the same targets, alpha 0.9) and the preset. They differ in curriculum and objective alone, so that a
preset's learning-rate schedule is that of its baselines. Runs stand in --work under the digest of their configuration:
what is done is not done again, presets share the baselines that are equal, and the command started again continues.
Printed are means and standard deviations over seeds of the held-out loss and the calibration error, the differences
paired by seed with their 95 % interval, and the steps after which an arm first reaches the final loss of the label-only
run of its seed; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.about import about
from benchmarks.claims.__main__ import parse_seeds
from benchmarks.claims.base import Arm, Bench, Finding
from benchmarks.claims.paired import compare, mean_and_sd, written
from benchmarks.claims.report import finding_line
from benchmarks.claims.runs import Runs, run_arms
from potstill.common.config import load_config
from potstill.common.errors import UserError
from potstill.common.text_tables import table
from potstill.launch.presets import find_preset
from potstill.student_train.config.train import TrainConfig

PLAIN_KD = {"alpha": 0.9}  # forward KL at T = 1 with the tail bucket: the defaults of `objective`
EVALUATIONS = 10


def arms_of(options: argparse.Namespace) -> dict[str, Arm]:
    """Each arm's configuration: the preset, and two that differ from it in curriculum and objective alone."""
    preset = options.preset
    loaded = load_config(TrainConfig, find_preset(preset).path, [*options.overrides]).model_dump(mode="json")
    targets, scores = (_chosen(loaded["data"][kind], getattr(options, kind), kind) for kind in ("targets", "scores"))
    tree = _common(loaded, options)
    # A clock goes through the stores of a series, the last of which is of the finished teacher.
    series = [list(targets)[-1] for stage in tree["curriculum"] if stage["targets_clock"] is not None]
    used = series or [stage["targets"] for stage in tree["curriculum"] if stage["targets"] is not None]
    labels = {**tree, "curriculum": [{}], "objective": {}, "rescoring": None}
    arms = {"labels": labels}
    if used:
        store = options.targets[options.kd_targets] if options.kd_targets else targets[used[-1]]
        data = {**tree["data"], "targets": {"teacher": store}}
        arms["kd"] = {**labels, "data": data, "curriculum": [{"targets": "teacher"}], "objective": PLAIN_KD}
    arms[preset] = {**tree, "data": {**tree["data"], "targets": targets, "scores": scores}}
    return {name: Arm(config=arm) for name, arm in arms.items()}


def _chosen(wanted: Mapping[str, Any], given: Mapping[str, str], kind: str) -> dict[str, str]:
    missing = [name for name in wanted if name not in given]
    if missing:
        raise UserError(f"the preset reads {kind} {', '.join(wanted)}; give --{kind} {missing[0]}=STORE")
    return {name: given[name] for name in wanted}


def _common(tree: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What all arms have in common."""
    data = {**tree["data"], "tokens": options.tokens, "heldout": options.heldout, "targets": {}, "scores": {}}
    data |= {"global_batch_rows": options.batch_rows, "micro_batch_rows": options.micro_batch_rows}
    model = tree["model"]
    if options.model_config is not None:
        model = {**model, "config": options.model_config, "path": None}
    if options.model is not None:
        model = {**model, "config": None, "path": options.model}
    return {
        **tree,
        "run": {"name": "methods", "max_steps": options.steps, "num_threads": 1},
        "model": model,
        "data": data,
        "eval": {"every_steps": max(1, options.steps // EVALUATIONS)},
        "checkpoint": {"keep_last": 1},
    }


def findings_of(runs: Runs, preset: str) -> list[Finding]:
    """The preset's gain over each baseline, paired by seed."""
    baselines = {"kd": "plain KD", "labels": "labels"}
    return [
        compare(f"{preset} ahead of {words}", runs.final(preset), runs.final(arm))
        for arm, words in baselines.items()
        if arm in runs.arms and arm != preset
    ]


def arms_table(runs: Runs) -> str:
    """A line for each arm: loss, calibration error, steps to the final loss of labels."""
    goals = runs.final("labels")
    rows = [
        (
            arm,
            mean_and_sd(runs.final(arm)),
            mean_and_sd(runs.final(arm, "calibration_error")),
            "/".join(written(runs.reach(arm, goals), 0)),
        )
        for arm in runs.arms
    ]
    return table(["arm", "held-out loss", "calibration error", "steps to labels, by seed"], rows)


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    wrong = [text for text in texts if "=" not in text]
    if wrong:
        raise UserError(f"{wrong[0]!r}: expected NAME=STORE")
    return dict(text.split("=", 1) for text in texts)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--targets", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--scores", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--kd-targets", metavar="NAME", help="targets of the plain KD arm; default: the preset's last")
    parser.add_argument("--model-config", help="Hugging Face config of the student; default: the preset's")
    parser.add_argument("--model", help="folder of a trained student, in the place of random weights")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="a.b=value")
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--micro-batch-rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=parse_seeds, default=(1, 2, 3, 4, 5), help="default 1,2,3,4,5")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, each with one thread on a CPU")
    parser.add_argument("--work", type=Path, help="folder for runs; default: a temporary one")
    options = parser.parse_args(words)
    options.targets, options.scores = _pairs(options.targets), _pairs(options.scores)
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing, print the table and one JSON line."""
    options = parse(words)
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        bench = Bench(work=work, data=work, scale="cpu", seeds=options.seeds)
        runs = run_arms(bench, arms_of(options), options.parallel, any_source=True)
        findings = findings_of(runs, options.preset)
        print(arms_table(runs), "", *map(finding_line, findings), sep="\n")
        losses = {arm: runs.final(arm) for arm in runs.arms}
    told = [{"text": found.text, "effect": found.effect, "interval": found.interval} for found in findings]
    line = {"benchmark": "methods", "preset": options.preset, "seeds": list(options.seeds), "steps": options.steps}
    print(json.dumps({**line, "losses": losses, "findings": told, **about()}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"benchmarks.methods: error: {error}")
