"""The arithmetic setting of `pocl` and `paced`: problems in eight levels, a teacher that is right in five of them.

A problem is a prompt and its answer, one row each, the prompt masked off. Numbers are written with the last digit
first, so that a sum is written in the order in which it is made. The student is trained before, on right answers and
mostly on the easier levels, and comes to the claims with levels that it has mastered (two), that it solves sometimes
(three) and never (three). The teacher, four times its size, knows the first five levels; of the last three it has read
answers in which carries are forgotten, as people forget them, and gives such answers with confidence: what a student
cannot solve, this teacher cannot teach. Three of five problems that students are distilled on are of these levels.
References are always right, so exact match and pass rates are those of the true answer.

Everything is made by potstill's commands, once, below bench.folder("arithmetic"); seeds of arms are orders of rows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from benchmarks.claims.base import Bench, Table
from benchmarks.claims.paired import mean_and_sd
from benchmarks.claims.runs import Runs
from potstill.common.jobs import Job

ROW_LENGTH = 16
MARKS = "+-*="
END = "<end>"
TEMPERATURES = (1.3333, 1.6667, 2.0)  # of POCL's stages


@dataclass(frozen=True)
class Level:
    """One kind of problem: two numbers of so many digits, and what is done with them."""

    name: str
    operation: str
    digits: tuple[int, int]
    taught: bool  # whether the teacher has read right answers

    def problem(self, draws: random.Random) -> tuple[int, int]:
        """The two numbers; the first is the larger one where it must be."""
        first, second = (draws.randrange(1 if n == 1 else 10 ** (n - 1), 10**n) for n in self.digits)
        return (max(first, second), min(first, second)) if self.operation == "-" else (first, second)

    def answer(self, first: int, second: int) -> str:
        """The right one, as it is written: of a fixed length, the last digit first."""
        result = {"+": first + second, "-": first - second, "*": first * second}[self.operation]
        return written(result, self.width)

    def without_carry(self, first: int, second: int) -> str:
        """The answer of one who carries nothing; of a product, who takes the last digit of the second number alone."""
        if self.operation == "*":
            return written(first * (second % 10), self.width)
        pairs = zip(written(first, self.width), written(second, self.width), strict=True)
        sign = 1 if self.operation == "+" else -1
        return "".join(str((int(one) + sign * int(other)) % 10) for one, other in pairs)

    @property
    def width(self) -> int:
        """Digits of an answer."""
        longest = max(self.digits)
        return {"+": longest + 1, "-": longest, "*": sum(self.digits)}[self.operation]


LEVELS = (
    Level("add_2", "+", (2, 2), True),
    Level("add_3", "+", (3, 3), True),
    Level("subtract_3", "-", (3, 3), True),
    Level("multiply_2_1", "*", (2, 1), True),
    Level("multiply_3_1", "*", (3, 1), True),
    Level("add_4", "+", (4, 3), False),
    Level("subtract_4", "-", (4, 3), False),
    Level("multiply_2_2", "*", (2, 2), False),
)
NAMES = tuple(level.name for level in LEVELS)
MASTERED = NAMES[:2]
# Shares of the levels, in that order: of the distilled problems, the student's first ones, the teacher's.
SHARES = {
    "problems": (0.08, 0.08, 0.08, 0.08, 0.08, 0.2, 0.2, 0.2),
    "start": (0.24, 0.26, 0.17, 0.1, 0.14, 0.03, 0.03, 0.03),
    "teacher": (0.1, 0.12, 0.16, 0.12, 0.2, 0.1, 0.1, 0.1),
}
FORGOTTEN = 0.85  # share of the teacher's untaught problems whose carries are forgotten


def written(number: int, width: int) -> str:
    """Its digits, the last one first, filled up with zeros."""
    return str(number).zfill(width)[::-1]


def write_problems(path: Path, shares: Sequence[float], number: int, *, seed: int, forgotten: float = 0.0) -> None:
    """JSON lines with prompt and response; untaught problems have their carries forgotten in that share."""
    draws = random.Random(seed)
    lines = []
    for level in draws.choices(LEVELS, shares, k=number):
        first, second = level.problem(draws)
        wrong = not level.taught and draws.random() < forgotten
        response = level.without_carry(first, second) if wrong else level.answer(first, second)
        prompt = f"{str(first)[::-1]}{level.operation}{str(second)[::-1]}="
        lines.append(json.dumps({"prompt": prompt, "response": response}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of characters: ten digits, the marks, and the end of a document."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {text: number for number, text in enumerate([*"0123456789", *MARKS, END])}
    made = Tokenizer(models.WordLevel(words, unk_token=END))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    made.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END).save_pretrained(folder)


@dataclass(frozen=True, kw_only=True)
class Size:
    """problems: of the set that students are distilled on; heldout: of each level; steps: of students' runs."""

    problems: int
    heldout: int
    width: int
    start_steps: int
    teacher_width: int
    teacher_steps: int
    steps: int
    rows: int
    lr: float


SIZES = {
    "quick": Size(
        problems=160, heldout=8, width=16, start_steps=4, teacher_width=16, teacher_steps=4, steps=10, rows=8, lr=1e-3
    ),
    "cpu": Size(
        problems=8000,
        heldout=200,
        width=48,
        start_steps=2200,
        teacher_width=80,
        teacher_steps=1800,
        steps=400,
        rows=64,
        lr=3e-4,
    ),
    "gpu": Size(
        problems=40000,
        heldout=500,
        width=128,
        start_steps=3000,
        teacher_width=256,
        teacher_steps=5000,
        steps=1200,
        rows=256,
        lr=5e-4,
    ),
}


@dataclass(frozen=True)
class Arithmetic:
    """The setting below a bench's folder: jobs that make it, where it stands, and the runs of students."""

    bench: Bench

    @property
    def size(self) -> Size:
        """The numbers of the bench's scale."""
        return SIZES[self.bench.scale]

    @cached_property
    def folder(self) -> Path:
        """Below which all of the setting stands."""
        return self.bench.folder("arithmetic")

    def tokens(self, name: str) -> Path:
        """Tokens store of `problems`, `start`, `teacher`, or the held-out problems of a level."""
        return self.folder / "tokens" / name / "train"

    def model(self, name: str) -> Path:
        """Hugging Face folder of `start` (the student as it comes) or `teacher`."""
        return self.folder / "models" / name

    @property
    def targets(self) -> Path:
        """The teacher's targets over the problems."""
        return self.folder / "targets"

    @property
    def answers(self) -> Path:
        """Scores of the greedy answers of the student as it comes, and of its loss."""
        return self.folder / "answers" / "scores"

    def jobs(self) -> list[Job]:
        """All that the claims share."""
        size, tokenizer = self.size, self.folder / "tokenizer"
        if not (tokenizer / "tokenizer.json").is_file():
            write_tokenizer(tokenizer)
        numbers = {"problems": size.problems, "start": size.problems, "teacher": 2 * size.problems}
        jobs = []
        for seed, (name, number) in enumerate(numbers.items()):
            jobs.append(self._prepare(name, SHARES[name], number, seed, FORGOTTEN if name == "teacher" else 0.0))
        for place, level in enumerate(LEVELS):
            alone = [float(other is level) for other in LEVELS]
            jobs.append(self._prepare(level.name, alone, size.heldout, 100 + place, 0.0))
        jobs += self._pretrain("start", width=size.width, steps=size.start_steps, lr=6e-3)
        jobs += self._pretrain("teacher", width=size.teacher_width, steps=size.teacher_steps, lr=4e-3)
        words = f"dump --tokens {self.tokens('problems')} --teacher {self.model('teacher')} --output {self.targets}"
        words += " --mode top_k --k 14 --batch-rows 64"
        temperatures = f"temperatures=[{','.join(map(str, TEMPERATURES))}]"
        dump = (*words.split(), "--set", temperatures)
        jobs.append(self._job("targets", dump, "targets/manifest.json", "prepare-problems", "export-teacher"))
        words = f"rollout --tokens {self.tokens('problems')} --model {self.model('start')} --samples 0"
        words += f" --grade-ids --set grader.kind=rouge_l keep=none --output {self.folder / 'answers'}"
        done = "answers/scores/manifest.json"
        jobs.append(self._job("answers", words.split(), done, "prepare-problems", "export-start"))
        return jobs + [self._figures(model, level) for model in ("start", "teacher") for level in NAMES]

    def _figures(self, model: str, level: str) -> Job:
        """What a model scores on a level."""
        output = f"figures/{model}_{level}.json"
        words = f"eval --model {self.model(model)} --heldout {self.tokens(level)} --set batch_rows=100"
        words += f" --output {self.folder / output}"
        return self._job(f"{model}-{level}", words.split(), output, f"export-{model}", f"prepare-{level}")

    def _job(self, name: str, words: Sequence[str], done: str, *needs: str) -> Job:
        path = self.folder / done
        return Job(
            name=f"arithmetic-{name}",
            command=("potstill", *words),
            needs=tuple(f"arithmetic-{need}" for need in needs),
            is_done=path.is_file,
        )

    def _prepare(self, name: str, shares: Sequence[float], number: int, seed: int, forgotten: float) -> Job:
        """Write a set of problems, unless it stands; the job that makes its tokens store."""
        path = self.folder / "problems" / f"{name}.jsonl"
        if not path.is_file():
            write_problems(path, shares, number, seed=seed, forgotten=forgotten)
        words = (
            f"prepare --input {path} --output {self.tokens(name).parent} --tokenizer {self.folder / 'tokenizer'} "
            f"--prompt-field prompt --response-field response --packing rows --row-length {ROW_LENGTH} "
            "--rows-per-unit 500"
        )
        return self._job(f"prepare-{name}", words.split(), f"tokens/{name}/train/manifest.json")

    def _pretrain(self, name: str, *, width: int, steps: int, lr: float) -> list[Job]:
        """A model trained on labels, and its export."""
        tree = self.tree(
            steps=steps,
            lr=lr,
            model={"config": gpt2(width)},
            data={"tokens": str(self.tokens(name))},
            curriculum=[{}],
            schedule={"kind": "cosine", "warmup": 50 if steps > 50 else 1, "min_ratio": 0.05},
        )
        tree["run"] |= {"output_dir": str(self.folder / "runs" / name), "seed": 0, "name": name}
        path = self.folder / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        train = ("train", "--config", str(path), "--num-ranks", "1")
        words = f"export --run {self.folder}/runs/{name} --output {self.model(name)} --no-check"
        words += f" --tokenizer {self.folder / 'tokenizer'}"
        return [
            self._job(f"train-{name}", train, f"runs/{name}/done.json", f"prepare-{name}"),
            self._job(f"export-{name}", words.split(), f"models/{name}/config.json", f"train-{name}"),
        ]

    def tree(self, *, steps: int, lr: float, data: Mapping[str, Any], **groups: Any) -> dict[str, Any]:
        """A training configuration with these groups, without run.output_dir and run.seed."""
        return {
            "run": {"max_steps": steps, "num_threads": 1},
            "data": {"global_batch_rows": self.size.rows, "micro_batch_rows": self.size.rows, **data},
            "optimizer": {"lr": lr, "weight_decay": 0.01, "grad_clip": 1.0},
            "logging": {"every_steps": max(1, steps // 8)},
            "zero_stage": 0,
            **groups,
        }

    def student(self, curriculum: Sequence[Mapping[str, Any]], **groups: Any) -> dict[str, Any]:
        """A student's run over the problems, measured on each level: its rows are drawn from one source alone."""
        tokens, steps = str(self.tokens("problems")), self.size.steps
        stores = {"targets": {"teacher": str(self.targets)}, "scores": {"start": str(self.answers)}}
        sources: dict[str, Any] = {"problems": {"tokens": tokens, **stores}}
        sources |= {name: {"tokens": tokens, "heldout": str(self.tokens(name))} for name in NAMES}
        return self.tree(
            steps=steps,
            lr=self.size.lr,
            data={"sources": sources},
            model={"path": str(self.model("start"))},
            curriculum=[{"mix": {"problems": 1}, **stage} for stage in curriculum],
            eval={"every_steps": max(1, steps // 10)},
            **groups,
        )


def exact_match(runs: Runs, arm: str, levels: Sequence[str] = NAMES) -> list[float]:
    """Mean exact match over levels at the end, in points, by seed."""
    by_level = [runs.final(arm, f"{name}/answer_accuracy") for name in levels]
    return [100.0 * sum(values) / len(levels) for values in zip(*by_level, strict=True)]


def curves(runs: Runs, arm: str) -> list[list[tuple[float, float]]]:
    """Mean exact match over the levels in points, at each evaluation."""
    return [[(step, 100.0 * value) for step, value in curve] for curve in runs.curves(arm, "answer_accuracy")]


def level_table(bench: Bench, runs: Runs, title: str) -> Table:
    """Exact match of each arm by level at the end, and over all."""
    start = start_figures(bench)
    lines = [
        (
            "as it comes",
            *(f"{100 * start[name]:.1f}" for name in NAMES),
            f"{100 * sum(start.values()) / len(NAMES):.1f}",
        )
    ]
    for arm in runs.arms:
        means = (sum(exact_match(runs, arm, [name])) / len(runs.bench.seeds) for name in NAMES)
        lines.append((arm, *(f"{mean:.1f}" for mean in means), mean_and_sd(exact_match(runs, arm), 2)))
    return Table(title=title, header=("arm", *NAMES, "all"), rows=tuple(lines))


def start_figures(bench: Bench, model: str = "start") -> dict[str, float]:
    """Exact match by level of the student as it comes, or of the teacher."""
    setting = Arithmetic(bench)
    paths = {name: setting.folder / "figures" / f"{model}_{name}.json" for name in NAMES}
    return {name: json.loads(path.read_text(encoding="utf-8"))["answer_accuracy"] for name, path in paths.items()}


def gpt2(width: int) -> dict[str, Any]:
    """Two layers of this width, with learned positions."""
    return {
        "model_type": "gpt2",
        "n_embd": width,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 4 * ROW_LENGTH,  # a rollout looks at the model with longer lines than any here
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": False,
    }
