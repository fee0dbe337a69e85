"""The text setting: novels in rows of 128 tokens, language models trained on them, and students that read them once.

What the claims on text share. The text does not depend on the machine: the novels of ../shared/data, by the number of
the document, and a tokenizer trained on the students' part by `prepare`. Everything is made by potstill's commands,
once, below bench.folder("text"). Teachers read other books besides the students'; nobody reads the held-out documents.
The learning rate is that of the label arm (64 x 3, 500 steps of 8 rows, seed 1; held-out loss at the end): 3e-3 4.4215,
6e-3 4.3141, 1.2e-2 4.2665.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.claims.base import Bench
from potstill.common.jobs import Job

NEEDS = ("novels",)
# Warm-up, stable, decay to 0: with the initial weights by width every model of this setting trains alike by it.
WSD: dict[str, Any] = {"kind": "wsd", "warmup": 0.05, "decay": 0.2, "min_ratio": 0.0}
# One store for every claim on the teacher; students that train at temperature 2 need its tails.
SELECTION = ("--mode", "top_p_k", "--p", "0.98", "--k", "50", "--temperatures", "2.0")


@dataclass(frozen=True)
class Shape:
    """A Llama of this width and depth, with heads of 32 and tied embeddings."""

    hidden: int
    layers: int

    def config(self, *, row_length: int) -> dict[str, Any]:
        """As Hugging Face's config.json; nothing is said of the vocabulary and of initial weights."""
        heads = max(1, self.hidden // 32)
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.hidden * 8 // 24 * 8,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": row_length,
            "tie_word_embeddings": True,
        }


@dataclass(frozen=True, kw_only=True)
class Model:
    """A language model that is trained on labels: its shape, steps, rows of a step, peak learning rate."""

    shape: Shape
    steps: int
    batch_rows: int
    lr: float


@dataclass(frozen=True, kw_only=True)
class TextSize:
    """Numbers of the setting. student, teacher, heldout_documents: each so many documents are taken; 1 takes all."""

    student_every: int
    teacher_every: int
    heldout_every: int
    vocab_size: int
    row_length: int
    student: Model
    teacher: Model


SIZES: dict[str, TextSize] = {
    "quick": TextSize(
        student_every=80,
        teacher_every=200,
        heldout_every=120,
        vocab_size=300,
        row_length=32,
        student=Model(shape=Shape(32, 2), steps=8, batch_rows=4, lr=4e-3),
        teacher=Model(shape=Shape(64, 2), steps=8, batch_rows=4, lr=4e-3),
    ),
    "cpu": TextSize(
        student_every=4,
        teacher_every=1,
        heldout_every=22,
        vocab_size=1024,
        row_length=128,
        student=Model(shape=Shape(64, 3), steps=500, batch_rows=8, lr=1.2e-2),
        teacher=Model(shape=Shape(128, 4), steps=1000, batch_rows=16, lr=6e-3),
    ),
    "gpu": TextSize(
        student_every=1,
        teacher_every=1,
        heldout_every=4,
        vocab_size=2048,
        row_length=256,
        student=Model(shape=Shape(256, 4), steps=600, batch_rows=12, lr=2e-3),
        teacher=Model(shape=Shape(384, 6), steps=3000, batch_rows=32, lr=2e-3),
    ),
}


@dataclass(frozen=True)
class Text:
    """The setting below a bench's folder: jobs that make it, and where it stands."""

    bench: Bench

    @property
    def size(self) -> TextSize:
        """The numbers of the bench's scale."""
        return SIZES[self.bench.scale]

    @cached_property
    def folder(self) -> Path:
        """Below which all of the setting stands."""
        return self.bench.folder("text")

    @property
    def tokens(self) -> Path:
        """Tokens store of the students' text."""
        return self.folder / "data" / "train"

    @property
    def teacher_tokens(self) -> Path:
        """Tokens store of the teachers' text: the students' documents, and those of other books."""
        return self.folder / "teacher_data" / "train"

    @property
    def heldout(self) -> Path:
        """Tokens store of documents that nobody is trained on."""
        return self.folder / "heldout_data" / "train"

    @property
    def tokenizer(self) -> Path:
        """Folder of the one tokenizer."""
        return self.folder / "data" / "tokenizer"

    def model(self, name: str) -> Path:
        """Hugging Face folder of a language model."""
        return self.folder / "models" / name

    def targets(self, name: str) -> Path:
        """Targets store over the students' text."""
        return self.folder / "targets" / name

    def scores(self, name: str) -> Path:
        """Scores store over the students' text."""
        return self.folder / "scores" / name

    def heldout_scores(self, name: str) -> Path:
        """Scores store over the held-out rows."""
        return self.folder / "heldout_scores" / name

    def stores(self) -> list[Job]:
        """From the novels to the students' and the held-out tokens; the corpora are written at once."""
        size = self.size
        novels = self.bench.data / "novels"
        _write(self.folder / "corpus" / "student.jsonl", [novels / "train.jsonl.xz"], size.student_every)
        _write(self.folder / "corpus" / "heldout.jsonl", [novels / "valid.jsonl.xz"], size.heldout_every)
        return [
            self._prepare("student", "data", "--vocab-size", str(size.vocab_size)),
            self._prepare("heldout", "heldout_data", "--tokenizer", str(self.tokenizer)),
        ]

    def teacher(self) -> list[Job]:
        """A teacher that is larger than the students, and its text; the corpus is written at once."""
        books = [self.bench.data / "novels" / f"{name}.jsonl.xz" for name in ("train", "train-more")]
        _write(self.folder / "corpus" / "teacher.jsonl", books, self.size.teacher_every)
        prepare = self._prepare("teacher", "teacher_data", "--tokenizer", str(self.tokenizer))
        return [prepare, *self.language_model("teacher", self.size.teacher, tokens=self.teacher_tokens)]

    def language_model(
        self, name: str, model: Model, *, tokens: Path | None = None, early: int | None = None
    ) -> list[Job]:
        """Train on labels (the students' text, or `tokens`) and export; the model of step `early` as NAME-early too."""
        config = self.folder / "configs" / name / "config.json"
        config.parent.mkdir(parents=True, exist_ok=True)
        full = {**model.shape.config(row_length=self.size.row_length), "vocab_size": self.size.vocab_size}
        config.write_text(json.dumps(full), encoding="utf-8")
        run = self.folder / "runs" / name
        every = early or max(1, model.steps // 5)
        settings = {
            "run.name": name,
            "run.num_threads": 1,
            "data.heldout": self.heldout,
            "data.global_batch_rows": model.batch_rows,
            "data.micro_batch_rows": model.batch_rows,
            "optimizer.lr": model.lr,
            "schedule.min_ratio": 0.0,
            "checkpoint.every_steps": every,
            "checkpoint.keep_last": 1 if early is None else -(-model.steps // every),
        }
        words = ["train", "--preset", "lm", "--output", run, "--steps", model.steps, "--num-ranks", 1]
        words += ["--tokens", tokens or self.tokens, "--model-config", config.parent, "--set"]
        words += [f"{key}={value}" for key, value in settings.items()]
        needs = ["prepare-heldout", "prepare-student" if tokens is None else "prepare-teacher"]
        jobs = [_job(f"train-{name}", words, run / "done.json", *needs), self._export(name, run, f"train-{name}")]
        if early is not None:
            jobs.append(self._export(f"{name}-early", run / "checkpoints" / f"step_{early:08d}", f"train-{name}"))
        return jobs

    def final_loss(self, name: str) -> float:
        """Held-out loss that a language model was trained to."""
        done = json.loads((self.folder / "runs" / name / "done.json").read_text(encoding="utf-8"))
        return float(done["heldout"]["heldout_loss"])

    def dump(self, name: str, model: str, selection: Sequence[str] = SELECTION) -> Job:
        """Targets of a language model over the students' text."""
        words = ["dump", "--tokens", self.tokens, "--teacher", self.model(model), "--output", self.targets(name)]
        words += [*selection, "--batch-rows", 16]
        self.targets(name).parent.mkdir(exist_ok=True)  # a dump makes its store, not the folders above it
        return _job(f"dump-{name}", words, self.targets(name) / "manifest.json", f"export-{model}")

    def score(self, name: str, model: str) -> Job:
        """Scores of a language model over the students' text."""
        words = ["score", "--tokens", self.tokens, "--slm", self.model(model), "--output", self.scores(name)]
        self.scores(name).parent.mkdir(exist_ok=True)
        return _job(
            f"score-{name}", [*words, "--batch-rows", 16], self.scores(name) / "manifest.json", f"export-{model}"
        )

    def score_heldout(self, model: str) -> Job:
        """Scores of a language model over the held-out rows."""
        output = self.heldout_scores(model)
        output.parent.mkdir(exist_ok=True)
        words = ["score", "--tokens", self.heldout, "--slm", self.model(model), "--output", output, "--batch-rows", 16]
        return _job(f"score-heldout-{model}", words, output / "manifest.json", f"export-{model}", "prepare-heldout")

    def import_rows(self, name: str, ids: Path, output: Path) -> Job:
        """A tokens store (OUTPUT/train) of rows that stand in a file as JSON lines of ids."""
        words = ["import", "tokens", "--input", ids, "--output", output, "--tokenizer", self.tokenizer]
        words += ["--row-length", self.size.row_length, "--packing", "rows", "--bounds", "end_token"]
        return _job(name, words, output / "train" / "manifest.json")

    def config(
        self,
        *,
        data: Mapping[str, Any] | None = None,
        curriculum: Sequence[Mapping[str, Any]] = ({},),
        objective: Mapping[str, Any] | None = None,
        shape: Shape | None = None,
        steps: int | None = None,
        evaluations: int = 10,
    ) -> dict[str, Any]:
        """The tree of a student's run; `data` names targets, scores or sources beside what all have in common."""
        student = self.size.student
        steps = steps or student.steps
        rows = {"global_batch_rows": student.batch_rows, "micro_batch_rows": student.batch_rows}
        places = {"tokens": str(self.tokens), "heldout": str(self.heldout)}
        if data is not None and "sources" in data:
            places = {}
        return {
            "run": {"name": "claims", "max_steps": steps, "num_threads": 1},
            "model": {"config": (shape or student.shape).config(row_length=self.size.row_length)},
            "data": {**places, **rows, **(data or {})},
            "objective": dict(objective or {}),
            "curriculum": [dict(stage) for stage in curriculum],
            "optimizer": {"lr": student.lr},
            "schedule": WSD,
            "eval": {"every_steps": max(1, steps // evaluations)},
            "checkpoint": {"keep_last": 1},
        }

    def _prepare(self, name: str, output: str, *words: str) -> Job:
        corpus = self.folder / "corpus" / f"{name}.jsonl"
        fixed = ["prepare", "--input", corpus, "--output", self.folder / output, "--row-length", self.size.row_length]
        done = self.folder / output / "train" / "manifest.json"
        needs = () if name == "student" else ("prepare-student",)
        return _job(f"prepare-{name}", [*fixed, "--rows-per-unit", 128, *words], done, *needs)

    def _export(self, name: str, run: Path, need: str) -> Job:
        words = ["export", "--run", run, "--output", self.model(name), "--tokenizer", self.tokenizer, "--no-check"]
        return _job(f"export-{name}", words, self.model(name) / "config.json", need)


def _job(name: str, words: Iterable[Any], done: Path, *needs: str) -> Job:
    return Job(name=name, command=("potstill", *map(str, words)), needs=needs, is_done=done.is_file)


def _write(path: Path, sources: Sequence[Path], every: int) -> None:
    """One JSON-lines file of each `every`-th document of the sources, if it is not there."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as out:
        for source in sources:
            for number, text in enumerate(_texts(source)):
                if number % every == 0:
                    out.write(json.dumps({"text": text}) + "\n")
    partial.replace(path)


def _texts(path: Path) -> Iterator[str]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]
