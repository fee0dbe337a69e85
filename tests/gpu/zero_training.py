"""A short training run as a process of its own (one rank, its own process group); prints what it saw as JSON.

Argument: a file with the configuration as JSON. Started by test_training_gpu.py, once for each ZeRO stage.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    import torch

    from potstill.student_train.run.metrics import read_metrics
    from potstill.student_train.run.trainer import train
    from tests.student_train import workers

    tree = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    summary = train(workers.config_of(tree))
    lines = [line for line in read_metrics(Path(tree["run"]["output_dir"])) if "grad_norm" in line]
    found = {
        "group": torch.distributed.get_backend(),
        "steps": summary.steps,
        "losses": [line["loss"] for line in lines],
        "norms": [line["grad_norm"] for line in lines],
    }
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
