"""Runs of arms: each once for a configuration, its stores and a seed; and what is read of them.

A run stands in WORK/runs/DIGEST-SEED. The digest is over the configuration (keys at their defaults do not count), the
manifests of the stores and the weights that it names: a store made anew is another run. Beside the run stands the
digest of the source that it was made with; a run of another source is made again, unless the caller takes it as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from benchmarks.claims.base import Arm, Bench
from potstill.common.config import build_config
from potstill.common.errors import UserError
from potstill.common.jobs import Job, JobRunner, Starter, say, shell_line
from potstill.common.processes import start
from potstill.launch.ranks import count_devices
from potstill.launch.warm_server import WarmChild, warm_up
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.run.metrics import read_metrics
from potstill.student_train.run.run_folder import versions

SOURCE = Path(__file__).resolve().parents[2] / "src" / "potstill"
# Of what a run or a store is made; commands, presets and the demo change none.
ROOMS = ("common", "kernels", "storage", "student_train", "teacher_dump")
MADE_WITH = ".made_with.json"  # beside the folder of a run: by which source


def told_keys(value: Any) -> Any:
    """A configuration as plain values without the keys that stand at their defaults (`kind` always says what it is)."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        told = {name: getattr(value, name) for name, field in fields.items()}
        return {
            name: told_keys(found)
            for name, found in told.items()
            if name == "kind" or found != fields[name].get_default(call_default_factory=True)
        }
    if isinstance(value, dict):
        return {name: told_keys(found) for name, found in value.items()}
    return [told_keys(found) for found in value] if isinstance(value, list | tuple) else value


@cache
def source_digest() -> str:
    """sha256 over the Python files of the rooms that make runs and stores, first 16 digits."""
    total = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((SOURCE / room).rglob("*.py")):
            total.update(str(path.relative_to(SOURCE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def _content(path: Path) -> str | None:
    """What stands at a path of the configuration: the digest of a store's manifest or of a model's weights."""
    found = [path / "manifest.json", path / "config.json", *sorted(path.glob("*.safetensors"))]
    existing = [file for file in found if file.is_file()]
    if not existing:
        return None
    total = hashlib.sha256()
    for file in existing:
        total.update(file.read_bytes())
    return total.hexdigest()


def _contents(value: Any) -> Iterator[str]:
    """Digests of all that strings of a tree name, in the order of the tree."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from _contents(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _contents(inner)
    elif isinstance(value, str) and "/" in value and (found := _content(Path(value))) is not None:
        yield found


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of an arm."""

    bench: Bench
    arm: Arm
    seed: int

    @cached_property
    def folder(self) -> Path:
        """Where it stands. Raises UserError: the configuration is not one."""
        tree = {**self.arm.config, "run": {**self.arm.config["run"], "output_dir": "run", "seed": 0}}
        told = told_keys(build_config(TrainConfig, tree, source="claims"))
        key = json.dumps([told, list(_contents(tree))], sort_keys=True, default=str)
        return self.bench.work / "runs" / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}-{self.seed}"

    @property
    def is_done(self) -> bool:
        """Whether it has reached its last step."""
        return (self.folder / "done.json").is_file()

    @property
    def made_with(self) -> dict[str, str]:
        """Source digest and commit; empty where nothing is said."""
        path = self._made_with_path
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @property
    def _made_with_path(self) -> Path:
        return self.folder.with_name(self.folder.name + MADE_WITH)

    def eval_path(self, name: str) -> Path:
        """Where the figures of one of the arm's evals stand."""
        return self.folder / f"eval_{name}.json"

    def jobs(self) -> list[Job]:
        """The run and its evals; the configuration is written."""
        tree = {**self.arm.config, "run": {**self.arm.config["run"], "output_dir": str(self.folder), "seed": self.seed}}
        path = self.bench.work / "configs" / f"{self.folder.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        name = self.folder.name
        command: tuple[str, ...] = ("potstill", "train", "--config", str(path), "--num-ranks", "1")
        jobs = [Job(name=name, command=command, is_done=lambda: self.is_done)]
        for word, words in self.arm.evals.items():
            output = self.eval_path(word)
            command = ("potstill", "eval", "--model", str(self.folder), *words, "--output", str(output))
            jobs.append(Job(name=f"{name}-{word}", command=command, is_done=output.is_file, needs=(name,)))
        return jobs

    def forget_other_source(self) -> None:
        """Remove the run if other source made it; else say what makes it."""
        if self.folder.is_dir() and self.made_with.get("source") != source_digest():
            say(f"{self.folder.name}: made by other source, made again")
            shutil.rmtree(self.folder)
        if not self.folder.is_dir():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            made = {"source": source_digest(), "commit": versions()["commit"][:12]}
            self._made_with_path.write_text(json.dumps(made), encoding="utf-8")


def run_jobs(jobs: Sequence[Job], work: Path, parallel: int) -> None:
    """Run what is missing, `parallel` at a time with one thread each on a CPU. Raises UserError: a job failed."""
    if not jobs:
        return
    on_gpu = count_devices() > 0
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        warm_up()  # a fork of a process that has imported torch, instead of seconds of imports for each run

    def cold(words: Any, output: Path) -> Any:
        return start([sys.executable, "-m", "potstill.launch", *words], output=output)

    starter: Starter = cold if on_gpu else WarmChild
    JobRunner(list(jobs), starter=starter, slots=parallel, log_folder=work / "logs", show=say).run()


def run_setting(jobs: Sequence[Job], bench: Bench, parallel: int) -> None:
    """As `run_jobs`, for jobs that make a setting; what another command line made is not taken for what is asked for.

    Each command line is kept below the built stores, with the configuration files that it names. Raises UserError: one
    differs from that of a job which is done.
    """
    folder = bench.work / "built" / bench.scale / "commands"
    folder.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        path = folder / f"{job.name}.txt"
        told = "\n".join([shell_line(job.command), *_named_files(job.command)]).replace(str(bench.work), "WORK")
        if job.is_done() and path.is_file() and path.read_text(encoding="utf-8") != told:
            raise UserError(
                f"{job.name}: what stands below {folder.parent} was made by another command line ({path}) than this: "
                f"{shell_line(job.command)}. Remove what it made, and what was made of that, or name another --work"
            )
        path.write_text(told, encoding="utf-8")
    run_jobs(jobs, bench.work, parallel)


def _named_files(command: Sequence[str]) -> Iterator[str]:
    """Contents of the configurations among the words: a YAML file, or the config.json of a folder without weights."""
    for word in map(Path, command):
        if word.suffix == ".yaml" and word.is_file():
            yield word.read_text(encoding="utf-8")
        elif (word / "config.json").is_file() and not list(word.glob("*.safetensors")):
            yield (word / "config.json").read_text(encoding="utf-8")


def run_arms(bench: Bench, arms: dict[str, Arm], parallel: int, *, any_source: bool) -> Runs:
    """Run every arm with every seed, a seed of all arms first. Raises UserError for the first that fails."""
    made: dict[str, Job] = {}
    for seed in bench.seeds:
        for arm in arms.values():
            run = Run(bench=bench, arm=arm, seed=seed)
            if not (any_source and run.is_done):
                run.forget_other_source()
            made |= {job.name: job for job in run.jobs()}
    run_jobs(list(made.values()), bench.work, parallel)
    return Runs(bench, arms)


class Runs:
    """The finished runs of a claim's arms: all lists are by seed, in the order of bench.seeds."""

    def __init__(self, bench: Bench, arms: dict[str, Arm]) -> None:
        self.bench = bench
        self.arms = arms
        self._records: dict[tuple[str, int], list[dict[str, Any]]] = {}

    def run(self, arm: str, seed: int) -> Run:
        """One run. Raises UserError: no such arm."""
        if arm not in self.arms:
            raise UserError(f"no arm {arm!r}; there are {', '.join(self.arms)}")
        return Run(bench=self.bench, arm=self.arms[arm], seed=seed)

    def records(self, arm: str, seed: int, kind: str = "eval") -> list[dict[str, Any]]:
        """Its lines of metrics of one kind, in order."""
        key = (arm, seed)
        if key not in self._records:
            self._records[key] = read_metrics(self.run(arm, seed).folder)
        return [record for record in self._records[key] if record["kind"] == kind]

    def curves(self, arm: str, figure: str = "heldout_loss", *, x: str = "step") -> list[list[tuple[float, float]]]:
        """(x, figure) at each evaluation. A figure of a source is `NAME/figure`. Raises UserError: a line lacks it."""
        return [
            [(float(record[x]), value_of(record, figure)) for record in self.records(arm, seed)]
            for seed in self.bench.seeds
        ]

    def final(self, arm: str, figure: str = "heldout_loss") -> list[float]:
        """The figure at the last evaluation."""
        return [curve[-1][1] for curve in self.curves(arm, figure)]

    def reach(
        self, arm: str, goals: Sequence[float], figure: str = "heldout_loss", *, x: str = "step", falling: bool = True
    ) -> list[float | None]:
        """The first evaluated x at which the figure has come to the seed's goal (at most it, or at least), or None."""
        found: list[float | None] = []
        for curve, goal in zip(self.curves(arm, figure, x=x), goals, strict=True):
            reached = (place for place, value in curve if (value <= goal if falling else value >= goal))
            found.append(next(reached, None))
        return found

    def evaluated(self, arm: str, name: str) -> list[dict[str, Any]]:
        """Figures of one of the arm's evals."""
        paths = [self.run(arm, seed).eval_path(name) for seed in self.bench.seeds]
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def made_with(self) -> list[dict[str, str]]:
        """The different sources that made these runs."""
        found = [self.run(arm, seed).made_with for arm in self.arms for seed in self.bench.seeds]
        return [json.loads(text) for text in sorted({json.dumps(made, sort_keys=True) for made in found})]


def value_of(record: dict[str, Any], figure: str) -> float:
    """A figure of an evaluation, `NAME/figure` of one source. Raises UserError: it is not there."""
    part: Any = record
    name = figure
    if "/" in figure:
        source, name = figure.split("/", 1)
        part = record.get("sources", {}).get(source, {})
    value = part.get(name)
    if value is None:
        raise UserError(f"the evaluation at step {record.get('step')} has no {figure!r}; it has {sorted(part)}")
    return float(value)
