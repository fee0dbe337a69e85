"""Presets against label-only training and plain KD: same stores, student, steps and learning rate, several seeds.

    python -m benchmarks.methods --preset salt --tokens data/train --heldout data/heldout --targets teacher=targets \
        --scores slm=scores --model-config configs/small --steps 400 --seeds 3 --work runs/methods
    python -m benchmarks.methods --all --data ../shared/data --work runs/methods --output benchmarks/results/methods.md

The first form compares one preset on your stores. The second makes stores of real text, runs every preset from random
weights, those of --trained from a trained student too, and writes the tables. Runs stand in --work under the digest
of their configuration: what is done is not done again, presets share the baselines that are equal, and the command
started again continues. Printed are means and spreads (standard deviations over seeds) of the held-out loss and the
calibration error at the end, the differences to plain KD and to labels by seed, and the steps after which an arm first
reaches the final loss of the label-only run of its seed; the last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.claims.runs import run_jobs, told_keys
from benchmarks.methods_report import PresetResult, Table, write_report
from benchmarks.methods_stores import SERIES, RealText
from potstill.common.config import build_config, load_config
from potstill.common.errors import UserError
from potstill.common.jobs import Job
from potstill.launch.presets import find_preset, list_presets
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.run.metrics import read_metrics

# Methods whose papers start from a trained student: their positions or rows are chosen by what it knows.
FROM_TRAINED = ("paced", "pocl", "se_kd", "tip")
PLAIN_KD = {"alpha": 0.9}  # forward KL at T = 1 with the tail bucket: the defaults of `objective`
STUDENT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What all arms have in common, and where their runs stand."""

    work: Path
    tokens: str
    heldout: str
    targets: dict[str, str]
    scores: dict[str, str]
    model: Any  # Hugging Face config of the student; None: the preset's
    weights: str | None = None  # folder of a trained student, instead of random weights
    steps: int = 400
    batch_rows: int = 8
    micro_batch_rows: int = 8
    seeds: int = 3
    evaluations: int = 10
    heldout_rows: int | None = None
    overrides: tuple[str, ...] = ()
    kd_targets: str | None = None  # store of the plain KD arm; None: the preset's last one
    renamed: dict[str, str] = field(default_factory=dict)  # a preset's store name -> one of `targets`

    def arms(self, preset: str) -> dict[str, dict[str, Any]]:
        """Configuration of each arm: the preset, and two that differ from it in curriculum and objective alone."""
        loaded = load_config(TrainConfig, find_preset(preset).path, [*self.overrides]).model_dump(mode="json")
        wanted = {name: self.targets[self.renamed.get(name, name)] for name in loaded["data"]["targets"]}
        tree = self._common(loaded)
        used = [stage["targets"] for stage in tree["curriculum"] if stage["targets"] is not None]
        labels = {**tree, "curriculum": [{}], "objective": {}}
        arms = {"labels": labels}
        if used:
            store = self.targets[self.kd_targets] if self.kd_targets else wanted[used[-1]]
            data = {**tree["data"], "targets": {"teacher": store}}
            arms["kd"] = {**labels, "data": data, "curriculum": [{"targets": "teacher"}], "objective": PLAIN_KD}
        scores = {name: self.scores[name] for name in loaded["data"]["scores"]}
        arms[preset] = {**tree, "data": {**tree["data"], "targets": wanted, "scores": scores}}
        return arms

    def _common(self, tree: dict[str, Any]) -> dict[str, Any]:
        data = {**tree["data"], "tokens": self.tokens, "heldout": self.heldout, "targets": {}, "scores": {}}
        data |= {"global_batch_rows": self.batch_rows, "micro_batch_rows": self.micro_batch_rows}
        model = tree["model"] if self.model is None else {**tree["model"], "config": self.model}
        if self.weights is not None:
            model = {**model, "config": None, "path": self.weights}
        run = {"name": "methods", "output_dir": "", "seed": 0, "max_steps": self.steps, "num_threads": 1}
        return {
            **tree,
            "run": run,
            "model": model,
            "data": data,
            "eval": {"every_steps": max(1, self.steps // self.evaluations), "max_rows": self.heldout_rows},
            "checkpoint": {"keep_last": 1},
        }

    def folder(self, tree: dict[str, Any], seed: int) -> Path:
        """Where the run of this configuration stands; equal configurations stand in one place.

        Keys at their defaults do not count, so that a key that comes later does not part a run from its folder.
        """
        named = {**tree, "run": {**tree["run"], "output_dir": "run"}}
        told = told_keys(build_config(TrainConfig, named, source="methods"))
        digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:12]
        return self.work / "runs" / f"{digest}-{seed}"

    def jobs(self, presets: list[str]) -> list[Job]:
        """All runs of all arms that these presets need, each once; their configurations are written."""
        made: dict[str, Job] = {}
        for seed in range(self.seeds):  # one seed of everything first, so that a table can be made early
            for preset in presets:
                for tree in self.arms(preset).values():
                    job = self._job(tree, seed)
                    made[job.name] = job
        return list(made.values())

    def _job(self, tree: dict[str, Any], seed: int) -> Job:
        folder = self.folder(tree, seed)
        path = folder.parent.parent / "configs" / f"{folder.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        tree = {**tree, "run": {**tree["run"], "output_dir": str(folder), "seed": seed}}
        path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        command = ("potstill", "train", "--config", str(path), "--num-ranks", "1")
        return Job(name=folder.name, command=command, is_done=(folder / "done.json").is_file)

    def finished_seeds(self, preset: str) -> list[int]:
        """Seeds of which every arm is done."""
        trees = self.arms(preset).values()
        return [
            seed
            for seed in range(self.seeds)
            if all((self.folder(tree, seed) / "done.json").is_file() for tree in trees)
        ]

    def result(self, preset: str) -> PresetResult:
        """The evaluations of all arms and finished seeds, read from the run folders. UserError: no seed is finished."""
        seeds = self.finished_seeds(preset)
        if not seeds:
            raise UserError(f"preset {preset}: no seed has all its runs done in {self.work}; run without --table-only")
        found = {}
        for name, tree in self.arms(preset).items():
            runs = [read_metrics(self.folder(tree, seed)) for seed in seeds]
            found[name] = [[record for record in run if record["kind"] == "eval"] for run in runs]
        return PresetResult(preset, found)


@dataclass(frozen=True)
class Section:
    """One table: presets, each with the comparison that it is part of."""

    title: str
    comparisons: dict[str, Comparison]

    def jobs(self) -> list[Job]:
        return [job for preset, comparison in self.comparisons.items() for job in comparison.jobs([preset])]

    def results(self) -> list[PresetResult]:
        return [comparison.result(preset) for preset, comparison in self.comparisons.items()]

    def table(self) -> Table:
        one = next(iter(self.comparisons.values()))
        return Table(self.title, self.results(), steps=one.steps, batch_rows=one.batch_rows)


def real_text(options: argparse.Namespace, work: Path, presets: list[str]) -> list[Section]:
    """Make the stores of real text; returns the presets from random weights, and those from a trained student."""
    text = RealText(data=Path(options.data).resolve(), work=work, every_document=options.every_document)
    text.check()
    text.write_corpora()
    if not options.table_only:
        run_jobs(text.jobs(series=bool({"progressive", "salt"} & set(presets))), work, options.parallel)
    targets = {name: str(text.targets(name)) for name in ("teacher", "sampled")}
    targets |= {name: str(text.targets("series") / name) for name in SERIES}
    scores = {name: str(text.scores(name)) for name in ("teacher", "slm", "early")}
    common: dict[str, Any] = {
        "work": work,
        "tokens": str(text.tokens),
        "heldout": str(text.heldout),
        "targets": targets,
        "scores": scores,
        "seeds": options.seeds,
        "heldout_rows": 64,
    }
    random = {**common, "model": STUDENT, "steps": options.steps, "overrides": ("optimizer.lr=3e-3",)}
    special = {
        # An early checkpoint as teacher, scored by an earlier one; plain KD with it throughout is the paper's RKD.
        "salt": {"renamed": {"teacher": "middle"}, "scores": {**scores, "slm": scores["early"]}},
        "rs_kd": {"renamed": {"teacher": "sampled"}, "kd_targets": "teacher"},
        "minillm_plm": {"scores": {**scores, "reference": scores["slm"]}},
    }
    sections = [Section("From random weights", {p: Comparison(**random | special.get(p, {})) for p in presets})]
    chosen = [preset for preset in options.trained if preset in presets]
    if chosen:
        trained = {**common, "model": None, "weights": str(text.slm), "steps": options.trained_steps}
        trained["overrides"] = ("optimizer.lr=5e-4",)
        sections.append(Section("From a trained student", {p: Comparison(**trained) for p in chosen}))
    return sections


def own_stores(options: argparse.Namespace, work: Path) -> Comparison:
    """The comparison on the stores named on the command line."""
    return Comparison(
        work=work,
        tokens=options.tokens,
        heldout=options.heldout,
        targets=dict(pair.split("=", 1) for pair in options.targets),
        scores=dict(pair.split("=", 1) for pair in options.scores),
        model=options.model_config,
        steps=options.steps,
        batch_rows=options.batch_rows,
        micro_batch_rows=options.micro_batch_rows,
        seeds=options.seeds,
        overrides=tuple(options.overrides),
        kd_targets=options.kd_targets,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--preset", help="compare this one, on --tokens, --heldout, --targets and --scores")
    what.add_argument("--all", action="store_true", help="every preset, on stores made of --data")
    parser.add_argument("--tokens")
    parser.add_argument("--heldout")
    parser.add_argument("--targets", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--scores", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--kd-targets", metavar="NAME", help="targets of the plain KD arm; default: the preset's last")
    parser.add_argument("--model-config", help="Hugging Face config of the student; default: the preset's")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="a.b=value")
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--micro-batch-rows", type=int, default=8)
    parser.add_argument("--data", help="folder of texts and models for --all")
    parser.add_argument("--every-document", type=int, default=2, help="with --all: take each so many documents")
    parser.add_argument("--presets", nargs="*", help="with --all: only these")
    parser.add_argument(
        "--trained", nargs="*", default=list(FROM_TRAINED), help="with --all: of these a table from a trained student"
    )
    parser.add_argument("--trained-steps", type=int, default=150, help="with --all: length of the runs of that table")
    parser.add_argument("--table-only", action="store_true", help="run nothing; the table of the seeds that are done")
    parser.add_argument("--output", type=Path, help="also write the table to this file (--all)")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, each with one thread on a CPU")
    parser.add_argument("--work", type=Path, help="folder for runs (and stores); default: a temporary one")
    options = parser.parse_args()
    if options.preset and not (options.tokens and options.heldout):
        parser.error("--preset needs --tokens and --heldout")
    if options.all and not options.data:
        parser.error("--all needs --data")
    return options


def main() -> None:
    """Run what is missing, print the tables and one JSON line."""
    options = parse()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        if options.all:
            # `lm` is the label-only arm itself.
            presets = options.presets or [preset.name for preset in list_presets() if preset.name != "lm"]
            sections = real_text(options, work, presets)
        else:
            sections = [Section(options.preset, {options.preset: own_stores(options, work)})]
        jobs = {job.name: job for section in sections for job in section.jobs()}
        by_seed = sorted(jobs.values(), key=lambda job: int(job.name.rsplit("-", 1)[1]))
        if not options.table_only:
            run_jobs(by_seed, work, options.parallel)
        tables = [section.table() for section in sections]
    for made in tables:
        print(made.title, made.format(), sep="\n\n", end="\n\n")
    if options.output:
        write_report(options.output, tables, seeds=options.seeds)
    figures = [{result.preset: result.figures() for result in made.results} for made in tables]
    line = {"steps": tables[0].steps, "seeds": options.seeds, "presets": figures[0]}
    print(json.dumps(line | ({"from_trained": figures[1]} if len(figures) > 1 else {})))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"benchmarks.methods: error: {error}")
