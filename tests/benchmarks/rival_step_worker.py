"""Three steps of a tiny student with our label loss and with a rival's; prints [[loss, ce] of each step] of both."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

from benchmarks.fused_ce import torch_best
from benchmarks.step import run_config, synthetic_stores
from benchmarks.step_rivals import label_loss_of, without_checkpoints
from potstill.student_train import train
from potstill.student_train.run.engine import stop_distributed
from potstill.student_train.run.metrics import read_metrics


def main(folder: Path) -> None:
    size = {"batch_rows": 2, "micro_batch_rows": 1, "row_length": 32, "vocab_size": 96, "hidden_size": 64}
    options = Namespace(**size, num_layers=1, steps=3, dtype="float32")
    synthetic_stores(folder, num_rows=6, row_length=32, vocab_size=96, top_k=8)
    losses = []
    for name, rival in (("ours", None), ("theirs", torch_best())):
        config = run_config(options, folder, name, {})
        with label_loss_of(rival), without_checkpoints():
            train(config)
        records = [record for record in read_metrics(config.run.output_dir) if record["kind"] == "train"]
        losses.append([(record["loss"], record["ce"]) for record in records])
    stop_distributed()
    print(json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
