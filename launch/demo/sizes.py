"""What the demo runs: sizes, configuration files, and the command line of each job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from potstill.common.jobs import Job

DUMP_WORKERS = 2
# Arms of the comparison, and what stands at the head of their YAML.
ARMS = {
    "labels": """\
# The student that sees labels only: same student, steps, order and learning rate as kd.yaml and distilled.yaml.
""",
    "kd": """\
# Plain distillation: the teacher's targets on all rows and all tokens, and no selector.
""",
    "distilled": """\
# Distillation with a selector: the rows where the teacher's mean loss lies furthest below that of the small language
# model, from 40 % of all rows at first to 70 % at the end. Noise is what neither of the two can predict, so it comes
# last in that order (difference sampling, MiniPLM, arXiv 2410.17215).
""",
}
SEED_NOTE = "# Another seed: --set run.seed=2 run.name={arm}-2 run.output_dir={folder}-2\n"


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A small Llama and how long it is trained."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    steps: int
    batch_rows: int = 2
    learning_rate: float = 3e-3

    def config(self, *, vocab_size: int, row_length: int) -> dict[str, Any]:
        """As Hugging Face's config.json."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "max_position_embeddings": row_length,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 0,
        }


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """All numbers of a demo."""

    corpus_bytes: int
    noise: float  # share of the passages to train on that are replaced by noise
    vocab_size: int
    row_length: int
    heldout_fraction: float
    kept_entries: int
    check_export: bool
    seeds: tuple[int, ...]  # of the students; everything else is made once
    teacher: ModelSize
    slm: ModelSize
    student: ModelSize


# A small vocabulary and two rows a step: in the half minute that a student has on one core, all arms come below the
# bigram's loss and still fall (benchmarks/results/demo_spread.md).
FULL = DemoSize(
    corpus_bytes=3_000_000,
    noise=0.4,
    vocab_size=512,
    row_length=256,
    heldout_fraction=0.05,
    kept_entries=32,
    check_export=True,
    seeds=(1, 2, 3),
    teacher=ModelSize(hidden_size=128, num_layers=3, num_heads=4, intermediate_size=344, steps=2400),
    slm=ModelSize(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=176, steps=600, learning_rate=6e-3),
    student=ModelSize(hidden_size=96, num_layers=2, num_heads=3, intermediate_size=256, steps=1200, learning_rate=4e-3),
)
# For tests: every job runs, the numbers mean little.
QUICK = DemoSize(
    corpus_bytes=300_000,
    noise=0.4,
    vocab_size=512,
    row_length=64,
    heldout_fraction=0.1,
    kept_entries=32,
    check_export=False,
    seeds=(1, 2),
    teacher=ModelSize(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=160, steps=40, learning_rate=5e-3),
    slm=ModelSize(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, steps=10, learning_rate=5e-3),
    student=ModelSize(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, steps=12, learning_rate=5e-3),
)


def student_config(size: DemoSize, root: Path, arm: str) -> dict[str, Any]:
    """The tree of one arm's runs (of its first seed); arms differ in name, folder and curriculum only."""
    name = f"{arm}-{size.seeds[0]}"
    student = size.student
    tree: dict[str, Any] = {
        "run": {
            "name": name,
            "output_dir": str(root / "runs" / name),
            "max_steps": student.steps,
            "seed": size.seeds[0],
        },
        "model": {"config": str(root / "configs" / "student")},
        "data": {
            "tokens": str(root / "data" / "train"),
            "heldout": str(root / "data" / "heldout"),
            "global_batch_rows": student.batch_rows,
            "micro_batch_rows": student.batch_rows,
        },
        "optimizer": {"lr": student.learning_rate},
        "schedule": {"kind": "cosine", "warmup": 0.05, "min_ratio": 0.05},
        "eval": {"every_steps": max(1, student.steps // 4)},
        "checkpoint": {"every_steps": max(10, student.steps // 4), "keep_last": 1},
    }
    if arm == "labels":
        return tree
    tree["data"]["targets"] = {"teacher": str(root / "targets" / "train")}
    tree["objective"] = {"alpha": 0.9, "divergence": "forward_kl", "missing_mass": "tail"}
    tree["curriculum"] = [{"name": "all", "targets": "teacher"}]
    if arm == "distilled":
        tree["data"]["scores"] = {"slm": str(root / "scores")}
        losses = [{"store": "slm", "stat": "mean_loss"}, {"store": "teacher", "stat": "mean_loss"}]
        share = {"kind": "linear", "start": 0.4, "end": 0.7}
        rows = {"score": {"kind": "difference", "of": losses}, "keep": "highest", "share": share, "segments": 8}
        tree["curriculum"] = [{"name": "selected", "targets": "teacher", "rows": rows}]
    return tree


def write_configs(size: DemoSize, root: Path) -> None:
    """Write the models' config.json and one YAML an arm below `root`/configs; the same bytes each time."""
    (root / "targets").mkdir(exist_ok=True)
    for name, model in (("teacher", size.teacher), ("slm", size.slm), ("student", size.student)):
        folder = root / "configs" / name
        folder.mkdir(parents=True, exist_ok=True)
        config = model.config(vocab_size=size.vocab_size, row_length=size.row_length)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for arm, head in ARMS.items():
        note = SEED_NOTE.format(arm=arm, folder=root / "runs" / arm)
        text = head + note + yaml.safe_dump(student_config(size, root, arm), sort_keys=False)
        (root / "configs" / f"{arm}.yaml").write_text(text, encoding="utf-8")


def student_names(seeds: Sequence[int]) -> list[str]:
    """Names of the students' runs, seed by seed."""
    return [f"{arm}-{seed}" for seed in seeds for arm in ARMS]


def make_jobs(size: DemoSize, root: Path) -> list[Job]:
    """The jobs, the most urgent first: label runs, which need no teacher, fill the core beside the teacher's run."""
    make = _StageMaker(size, root)
    first = f"distilled-{size.seeds[0]}"
    return [
        *store_jobs(size, root),
        *student_jobs(size, root, size.seeds),
        make.evaluate("teacher", "models/teacher", "export-teacher"),
        make.evaluate("slm", "models/slm", "export-slm"),
        *(make.evaluate(name, f"runs/{name}", f"train-{name}") for name in student_names(size.seeds)),
        make.export(first, check=size.check_export),
    ]


def store_jobs(size: DemoSize, root: Path) -> list[Job]:
    """From text to everything that a student reads: tokens, teacher, targets, small model, scores."""
    make = _StageMaker(size, root)
    return [
        make.prepare(),
        make.train_lm("teacher", size.teacher),
        make.train_lm("slm", size.slm),
        make.export("teacher"),
        *(make.dump_share("train", worker) for worker in range(DUMP_WORKERS)),
        make.export("slm"),
        make.score(),
        make.dump("heldout"),
        make.seal("train"),
    ]


def student_jobs(size: DemoSize, root: Path, seeds: Sequence[int]) -> list[Job]:
    """One run for each seed and arm, a seed of all arms first."""
    make = _StageMaker(size, root)
    return [make.train_student(arm, seed) for seed in seeds for arm in ARMS]


@dataclass(frozen=True)
class _StageMaker:
    """One method for each kind of job: its command line as a template, what it needs, what it leaves when done."""

    size: DemoSize
    root: Path

    def job(self, name: str, template: str, *needs: str, done: str, slots: int = 1) -> Job:
        # Words are made before the names are put in, so that a folder with a space stays one word.
        words = [word.format(root=self.root, size=self.size) for word in template.split()]
        is_done = (self.root / done).is_file
        return Job(name=name, command=("potstill", *words), needs=needs, is_done=is_done, slots=slots)

    def prepare(self) -> Job:
        template = (
            "prepare --input {root}/corpus --output {root}/data --vocab-size {size.vocab_size} "
            "--row-length {size.row_length} --rows-per-unit 128 --heldout-fraction {size.heldout_fraction}"
        )
        return self.job("prepare", template, done="data/heldout/manifest.json")

    def train_lm(self, name: str, model: ModelSize) -> Job:
        template = (
            f"train --preset lm --output {{root}}/runs/{name} --steps {model.steps} --num-ranks 1 "
            f"--model-config {{root}}/configs/{name} --tokens {{root}}/data/train --set run.name={name} "
            f"data.global_batch_rows={model.batch_rows} data.micro_batch_rows={model.batch_rows} "
            f"optimizer.lr={model.learning_rate} checkpoint.every_steps={max(10, model.steps // 8)} "
            "checkpoint.keep_last=1"
        )
        return self.job(f"train-{name}", template, "prepare", done=f"runs/{name}/done.json")

    def train_student(self, arm: str, seed: int) -> Job:
        name = f"{arm}-{seed}"
        needs = {"labels": ["prepare"], "kd": ["seal-train"], "distilled": ["seal-train", "score"]}[arm]
        template = (
            f"train --config {{root}}/configs/{arm}.yaml --num-ranks 1 "
            f"--set run.seed={seed} run.name={name} run.output_dir={{root}}/runs/{name}"
        )
        return self.job(f"train-{name}", template, *needs, done=f"runs/{name}/done.json")

    def export(self, name: str, *, check: bool = False) -> Job:
        # The check loads the model in a fresh process, which takes seconds: once is enough to see it.
        template = (
            f"export --run {{root}}/runs/{name} --output {{root}}/models/{name} --tokenizer {{root}}/data/tokenizer "
            + ("--check" if check else "--no-check")
        )
        return self.job(f"export-{name}", template, f"train-{name}", done=f"models/{name}/config.json")

    def dump(self, part: str, share: str = "") -> Job:
        template = (
            f"dump --tokens {{root}}/data/{part} --teacher {{root}}/models/teacher --output {{root}}/targets/{part} "
            f"--mode top_p_k --p 0.98 --k {{size.kept_entries}} --batch-rows 16 {share}"
        )
        return self.job(f"dump-{part}", template, "export-teacher", done=f"targets/{part}/manifest.json")

    def dump_share(self, part: str, worker: int) -> Job:
        made = self.dump(part, f"--worker {worker} --num-workers {DUMP_WORKERS}")
        # A worker leaves no mark of its own share; `seal` sees whether all shares are there.
        name = f"{made.name}-{worker}"
        marker = self.root / "logs" / f"{name}.done"
        return replace(made, name=name, marker=marker, is_done=marker.is_file)

    def seal(self, part: str) -> Job:
        needs = [f"dump-{part}-{worker}" for worker in range(DUMP_WORKERS)]
        return self.job(f"seal-{part}", f"seal {{root}}/targets/{part}", *needs, done=f"targets/{part}/manifest.json")

    def score(self) -> Job:
        template = "score --tokens {root}/data/train --slm {root}/models/slm --output {root}/scores --batch-rows 16"
        return self.job("score", template, "export-slm", done="scores/manifest.json")

    def evaluate(self, name: str, model: str, *needs: str) -> Job:
        template = (
            f"eval --model {{root}}/{model} --heldout {{root}}/data/heldout --targets {{root}}/targets/heldout "
            f"--output {{root}}/eval/{name}.json --batch-rows 16"
        )
        return self.job(f"eval-{name}", template, "dump-heldout", *needs, done=f"eval/{name}.json")
