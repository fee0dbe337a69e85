"""What the demo runs: sizes, configuration files, and the command line of each stage."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from potstill.launch.stages import Stage

DUMP_WORKERS = 2
DISTILLED_HEAD = """\
# The distilled student of the demo. Early, the small model's scores choose: rows that it finds easy, and the teacher's
# word only where the true token is within the small model's reach; later all rows and all tokens.
"""
LABELS_HEAD = """\
# The same student, seed and steps as distilled.yaml, and the same rows but for its first stage, where a selector
# chooses; here the labels are all it sees.
"""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A small Llama and how long it is trained."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    steps: int
    batch_rows: int = 8
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
    vocab_size: int
    row_length: int
    heldout_fraction: float
    kept_entries: int
    check_export: bool
    teacher_ranks: int
    teacher: ModelSize
    slm: ModelSize
    student: ModelSize


FULL = DemoSize(
    corpus_bytes=2_600_000,
    vocab_size=2048,
    row_length=256,
    heldout_fraction=0.05,
    kept_entries=32,
    check_export=True,
    teacher_ranks=2,
    teacher=ModelSize(
        hidden_size=160,
        num_layers=4,
        num_heads=4,
        intermediate_size=448,
        steps=1200,
        batch_rows=4,
        learning_rate=2.5e-3,
    ),
    slm=ModelSize(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=192, steps=200, learning_rate=4e-3),
    student=ModelSize(hidden_size=96, num_layers=2, num_heads=3, intermediate_size=256, steps=300, learning_rate=3e-3),
)
# For tests: every stage runs, the numbers mean little.
QUICK = DemoSize(
    corpus_bytes=300_000,
    vocab_size=512,
    row_length=64,
    heldout_fraction=0.1,
    kept_entries=32,
    check_export=False,
    teacher_ranks=1,
    teacher=ModelSize(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=160, steps=40, learning_rate=5e-3),
    slm=ModelSize(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, steps=10, learning_rate=5e-3),
    student=ModelSize(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, steps=20, learning_rate=5e-3),
)


def student_config(size: DemoSize, root: Path, *, distilled: bool) -> dict[str, Any]:
    """The tree of one student run; the two differ in the folder and in the curriculum only."""
    name = "distilled" if distilled else "labels-only"
    tree: dict[str, Any] = {
        "run": {"name": name, "output_dir": str(root / "runs" / name), "max_steps": size.student.steps, "seed": 1},
        "model": {"config": str(root / "configs" / "student")},
        "data": {
            "tokens": str(root / "data" / "train"),
            "global_batch_rows": size.student.batch_rows,
            "micro_batch_rows": size.student.batch_rows,
        },
        "optimizer": {"lr": size.student.learning_rate},
        "schedule": {"kind": "cosine", "warmup": 0.05, "min_ratio": 0.05},
        "checkpoint": {"every_steps": max(10, size.student.steps // 4), "keep_last": 1},
    }
    if distilled:
        tree["data"] |= {
            "targets": {"teacher": str(root / "targets" / "train")},
            "scores": {"slm": str(root / "scores")},
        }
        tree["objective"] = {"alpha": 0.9, "divergence": "forward_kl", "missing_mass": "tail"}
        tree["curriculum"] = [
            {
                "name": "selected",
                "until": 0.2,
                "targets": "teacher",
                "rows": {
                    "score": {"kind": "stat", "of": [{"store": "slm", "stat": "mean_loss"}]},
                    "keep": "lowest",
                    "share": {"kind": "linear", "start": 0.6, "end": 1.0},
                    "segments": 4,
                },
                "tokens": {"policy": "label_rank", "source": "slm", "max_rank": 64, "applies_to": "kd"},
            },
            {"name": "all", "targets": "teacher"},
        ]
    return tree


def write_configs(size: DemoSize, root: Path) -> None:
    """Write the models' config.json and the students' YAML below `root`/configs; the same bytes each time."""
    (root / "targets").mkdir(exist_ok=True)
    for name, model in (("teacher", size.teacher), ("slm", size.slm), ("student", size.student)):
        folder = root / "configs" / name
        folder.mkdir(parents=True, exist_ok=True)
        config = model.config(vocab_size=size.vocab_size, row_length=size.row_length)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, head, distilled in (("labels-only", LABELS_HEAD, False), ("distilled", DISTILLED_HEAD, True)):
        text = head + yaml.safe_dump(student_config(size, root, distilled=distilled), sort_keys=False)
        (root / "configs" / f"{name}.yaml").write_text(text, encoding="utf-8")


def make_stages(size: DemoSize, root: Path, *, num_ranks: int) -> list[Stage]:
    """The stages in order. `num_ranks` is how many ranks the teacher's run is spread over."""
    make = _StageMaker(size, root)
    return [
        make.prepare(),
        make.train_lm("teacher", size.teacher, num_ranks),
        make.train_lm("slm", size.slm, 1),
        make.export("teacher"),
        *(make.dump_share("train", worker) for worker in range(DUMP_WORKERS)),
        make.export("slm"),
        make.score(),
        make.dump("heldout"),
        make.seal("train"),
        make.train_student("distilled", "seal-train", "score"),
        make.train_student("labels-only", "prepare"),
        make.evaluate("teacher", "models/teacher", "export-teacher"),
        make.evaluate("slm", "models/slm", "export-slm"),
        make.evaluate("labels-only", "runs/labels-only", "train-labels-only"),
        make.evaluate("distilled", "runs/distilled", "train-distilled"),
        make.export("distilled", check=size.check_export),
    ]


@dataclass(frozen=True)
class _StageMaker:
    """One method for each kind of stage: its command line as a template, what it needs, what it leaves when done."""

    size: DemoSize
    root: Path

    def stage(self, name: str, template: str, *needs: str, done: str, slots: int = 1) -> Stage:
        # Words are made before the names are put in, so that a folder with a space stays one word.
        words = [word.format(root=self.root, size=self.size) for word in template.split()]
        is_done = (self.root / done).is_file
        return Stage(name=name, command=("potstill", *words), needs=needs, is_done=is_done, slots=slots)

    def prepare(self) -> Stage:
        template = (
            "prepare --input {root}/corpus --output {root}/data --vocab-size {size.vocab_size} "
            "--row-length {size.row_length} --rows-per-unit 128 --heldout-fraction {size.heldout_fraction}"
        )
        return self.stage("prepare", template, done="data/heldout/manifest.json")

    def train_lm(self, name: str, model: ModelSize, ranks: int) -> Stage:
        template = (
            f"train --preset lm --output {{root}}/runs/{name} --steps {model.steps} --num-ranks {ranks} "
            f"--model-config {{root}}/configs/{name} --tokens {{root}}/data/train --set run.name={name} "
            f"data.global_batch_rows={model.batch_rows} data.micro_batch_rows={model.batch_rows // ranks} "
            f"optimizer.lr={model.learning_rate} checkpoint.every_steps={max(10, model.steps // 8)} "
            "checkpoint.keep_last=1"
        )
        return self.stage(f"train-{name}", template, "prepare", done=f"runs/{name}/done.json", slots=ranks)

    def train_student(self, name: str, *needs: str) -> Stage:
        template = f"train --config {{root}}/configs/{name}.yaml --num-ranks 1"
        return self.stage(f"train-{name}", template, *needs, done=f"runs/{name}/done.json")

    def export(self, name: str, *, check: bool = False) -> Stage:
        # The check loads the model in a fresh process, which takes seconds: once is enough to see it.
        template = (
            f"export --run {{root}}/runs/{name} --output {{root}}/models/{name} --tokenizer {{root}}/data/tokenizer "
            + ("--check" if check else "--no-check")
        )
        return self.stage(f"export-{name}", template, f"train-{name}", done=f"models/{name}/config.json")

    def dump(self, part: str, share: str = "") -> Stage:
        template = (
            f"dump --tokens {{root}}/data/{part} --teacher {{root}}/models/teacher --output {{root}}/targets/{part} "
            f"--mode top_p_k --p 0.98 --k {{size.kept_entries}} --batch-rows 16 {share}"
        )
        return self.stage(f"dump-{part}", template, "export-teacher", done=f"targets/{part}/manifest.json")

    def dump_share(self, part: str, worker: int) -> Stage:
        made = self.dump(part, f"--worker {worker} --num-workers {DUMP_WORKERS}")
        # A worker leaves no mark of its own share; `seal` sees whether all shares are there.
        name = f"{made.name}-{worker}"
        marker = self.root / "logs" / f"{name}.done"
        return replace(made, name=name, marker=marker, is_done=marker.is_file)

    def seal(self, part: str) -> Stage:
        needs = [f"dump-{part}-{worker}" for worker in range(DUMP_WORKERS)]
        return self.stage(f"seal-{part}", f"seal {{root}}/targets/{part}", *needs, done=f"targets/{part}/manifest.json")

    def score(self) -> Stage:
        template = "score --tokens {root}/data/train --slm {root}/models/slm --output {root}/scores --batch-rows 16"
        return self.stage("score", template, "export-slm", done="scores/manifest.json")

    def evaluate(self, name: str, model: str, *needs: str) -> Stage:
        template = (
            f"eval --model {{root}}/{model} --heldout {{root}}/data/heldout --targets {{root}}/targets/heldout "
            f"--output {{root}}/eval/{name}.json --batch-rows 16"
        )
        return self.stage(f"eval-{name}", template, "dump-heldout", *needs, done=f"eval/{name}.json")
