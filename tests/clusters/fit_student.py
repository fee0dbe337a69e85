"""Trains in Ray Train as the page says: `python fit_student.py FAILURES KEY=VALUE...`, with run.yaml in this folder."""

from __future__ import annotations

import json
import os
import sys

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from potstill.student_train import ray_train_loop

if __name__ == "__main__":
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    trainer = TorchTrainer(
        ray_train_loop,
        train_loop_config={"config": "run.yaml", "folder": os.getcwd(), "set": sys.argv[2:]},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="student",
            storage_path=os.path.abspath("ray"),
            failure_config=FailureConfig(max_failures=int(sys.argv[1])),
        ),
    )
    result = trainer.fit()
    with open("result.json", "w", encoding="utf-8") as file:
        json.dump({"metrics": result.metrics, "checkpoint": os.listdir(result.checkpoint.path)}, file)
