"""One preset against label-only training and plain KD: same stores, student, steps and learning rate, several seeds.

    python -m benchmarks.methods --preset salt --tokens data/train --heldout data/heldout --targets teacher=targets \
        --scores slm=scores --model-config configs/small --steps 400 --seeds 3

Prints mean and spread (standard deviation over seeds) of the final held-out loss and calibration error, and the steps
after which an arm first reaches the final held-out loss of the label-only run of its seed; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from potstill.common.config import build_config, load_config
from potstill.launch.presets import find_preset
from potstill.student_train import train
from potstill.student_train.config import TrainConfig
from potstill.student_train.distributed import stop_distributed
from potstill.student_train.metrics import read_metrics

EVALUATIONS = 20


def named_paths(pairs: list[str]) -> dict[str, str]:
    """NAME=PATH words as a mapping."""
    return dict(pair.split("=", 1) for pair in pairs)


def arms_of(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Configuration of each arm as plain values: the preset, and two that differ from it in the curriculum alone."""
    overrides = [f"run.max_steps={options.steps}", f"data.tokens={options.tokens}", f"data.heldout={options.heldout}"]
    overrides += [f"data.global_batch_rows={options.batch_rows}", f"data.micro_batch_rows={options.micro_batch_rows}"]
    overrides += [f"eval.every_steps={max(1, options.steps // EVALUATIONS)}", "checkpoint.every_steps=null"]
    overrides += [f"data.targets.{name}={path}" for name, path in named_paths(options.targets).items()]
    overrides += [f"data.scores.{name}={path}" for name, path in named_paths(options.scores).items()]
    if options.model_config is not None:
        overrides.append(f"model.config={options.model_config}")
    path = find_preset(options.preset).path
    preset = load_config(TrainConfig, path, [*overrides, *options.overrides]).model_dump(mode="json")
    arms = {"labels": {**preset, "curriculum": [{}], "objective": {}}}
    targets = [stage["targets"] for stage in preset["curriculum"] if stage["targets"] is not None]
    if targets and options.preset != "rs_kd":
        arms["kd"] = {**preset, "curriculum": [{"targets": targets[-1]}], "objective": {"alpha": 0.9}}
    return {**arms, options.preset: preset}


def run_arm(tree: dict[str, Any], folder: Path, seed: int) -> list[dict[str, Any]]:
    """Train one arm with one seed; returns its evaluations in order."""
    tree = {**tree, "run": {**tree["run"], "output_dir": str(folder), "seed": seed}}
    train(build_config(TrainConfig, tree, source="benchmark"))
    return [record for record in read_metrics(folder) if record["kind"] == "eval"]


def summary(evaluations: list[list[dict[str, Any]]], baselines: list[float]) -> dict[str, Any]:
    """Mean and spread over seeds, and the steps to the baseline's final loss (null where it is never reached)."""

    def spread(name: str) -> dict[str, float]:
        values = [records[-1][name] for records in evaluations]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return {"mean": round(statistics.mean(values), 4), "spread": round(deviation, 4)}

    steps = [
        next((record["step"] for record in records if record["heldout_loss"] <= baseline), None)
        for records, baseline in zip(evaluations, baselines, strict=True)
    ]
    return {
        "heldout_loss": spread("heldout_loss"),
        "calibration_error": spread("calibration_error"),
        "steps_to_labels": steps,
    }


def main() -> None:
    """Run all arms and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--targets", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--scores", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--model-config", help="Hugging Face config of the student; default: the preset's")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--micro-batch-rows", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="a.b=value")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    baselines: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, tree in arms_of(options).items():
            runs = [run_arm(tree, Path(folder) / f"{name}-{seed}", seed) for seed in range(options.seeds)]
            baselines = baselines or [records[-1]["heldout_loss"] for records in runs]
            found[name] = summary(runs, baselines)
            loss, error = found[name]["heldout_loss"], found[name]["calibration_error"]
            print(
                f"{name:12s} held-out loss {loss['mean']:.4f} +- {loss['spread']:.4f}  calibration error "
                f"{error['mean']:.4f} +- {error['spread']:.4f}  steps to labels {found[name]['steps_to_labels']}"
            )
    stop_distributed()
    print(json.dumps({"preset": options.preset, "steps": options.steps, "seeds": options.seeds, "arms": found}))


if __name__ == "__main__":
    main()
