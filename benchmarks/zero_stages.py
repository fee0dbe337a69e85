"""A small student under each ZeRO stage, from the same weights and batches: steps per second, agreement of the losses.

    python -m benchmarks.zero_stages [--stages 1,2,3 --hidden-size 512 ...] [--output FILE]

One process, one rank, through the backend that the trainer takes: NCCL on a GPU, gloo elsewhere. On one rank
all stages do the same arithmetic, so their losses may differ by rounding alone. The file is written after each stage;
one that fails is named in it, and the exit code is 1. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.step import add_arguments, run_config, synthetic_stores, told
from benchmarks.step_rivals import without_checkpoints
from potstill.student_train import train
from potstill.student_train.run.engine import stop_distributed
from potstill.student_train.run.metrics import read_metrics


def starting_weights(model: dict[str, Any], *, vocab_size: int, row_length: int, folder: Path) -> Path:
    """A Hugging Face folder with one set of random weights, which all stages start from."""
    torch.manual_seed(0)
    kind = {key: value for key, value in model.items() if key != "model_type"}
    config = transformers.LlamaConfig(vocab_size=vocab_size, max_position_embeddings=row_length, **kind)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run_stage(options: argparse.Namespace, stage: int, folder: Path) -> tuple[list[float], float]:
    """The loss of each step, and steps per second after the warm-up (by the median)."""
    config = run_config(options, folder, f"zero-{stage}", {"targets": "teacher"})
    weights = folder / "weights"
    if not weights.is_dir():
        assert isinstance(config.model.config, dict)
        size = {"vocab_size": options.vocab_size, "row_length": options.row_length}
        starting_weights(config.model.config, folder=weights, **size)
    model = config.model.model_copy(update={"config": None, "path": weights})
    config = config.model_copy(update={"model": model, "zero_stage": stage})
    with without_checkpoints():
        train(config)
    records = [record for record in read_metrics(config.run.output_dir) if record["kind"] == "train"]
    seconds = statistics.median(record["step_seconds"] for record in records[options.warmup_steps :])
    return [record["loss"] for record in records], 1.0 / seconds


def stage_figures(losses: dict[int, list[float]], rates: dict[int, float], failures: dict[int, str]) -> dict[str, Any]:
    """The figures by their JSON names; agreement is the greatest difference of a step's loss between two stages."""
    figures: dict[str, Any] = {
        "steps_per_second": {f"zero_{stage}": round(rate, 3) for stage, rate in rates.items()},
        "losses": {f"zero_{stage}": values for stage, values in losses.items()},
    }
    if len(losses) > 1:
        steps = zip(*losses.values(), strict=True)
        figures["loss_relative_difference"] = max((max(step) - min(step)) / abs(step[0]) for step in steps)
    if failures:
        figures["failed"] = {f"zero_{stage}": what for stage, what in failures.items()}
    return figures


def main() -> int:
    """Run and print one JSON line; 1 if a stage failed."""
    load = os.getloadavg()[0]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--stages", default="1,2,3")
    parser.add_argument("--output", type=Path, help="also write the figures to this file, after each stage")
    options = parser.parse_args()
    losses: dict[int, list[float]] = {}
    rates: dict[int, float] = {}
    failures: dict[int, str] = {}
    text = ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = options.batch_rows * options.steps
        sizes = {"num_rows": rows, "row_length": options.row_length, "vocab_size": options.vocab_size}
        synthetic_stores(folder, top_k=options.top_k, **sizes)
        for stage in (int(word) for word in options.stages.split(",")):
            try:
                losses[stage], rates[stage] = run_stage(options, stage, folder)
            except Exception as failure:
                traceback.print_exc()
                failures[stage] = f"{type(failure).__name__}: {str(failure)[:200]}"
            text = told(stage_figures(losses, rates, failures), options, load=load)
    stop_distributed()
    print(text)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
