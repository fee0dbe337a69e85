"""Stores for the comparison of methods, made from real text by the commands that a user would run.

One student corpus, and over it: targets of a teacher (top-p-k with three tails, and draws) and of three checkpoints of
another teacher that is trained here on other books; scores of the teacher, of a small language model and of the other
teacher's first checkpoint. What is done is not done again.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.common.jobs import Job

# Steps of the series teacher's run after which its checkpoints are taken: the first while its loss still falls fast.
SERIES = {"early": 150, "middle": 300, "final": 600}
SERIES_ROWS = 8
SERIES_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
ROW_LENGTH = 256


@dataclass(frozen=True)
class RealText:
    """Where the text and the models are, and how much of the text is taken."""

    data: Path
    work: Path
    every_document: int = 2  # each so many documents of the student's books
    series_documents: int = 450  # of the other books

    def check(self) -> None:
        """Raises SystemExit that names what is missing."""
        wanted = ("novels/train.jsonl.xz", "novels/train-more.jsonl.xz", "novels/valid.jsonl.xz")
        missing = [name for name in (*wanted, "models/teacher-7m", "models/slm-2m") if not (self.data / name).exists()]
        if missing:
            raise SystemExit(f"{self.data} lacks {', '.join(missing)}; name the folder of texts and models with --data")
        for folder in (self.data, self.work):
            if " " in str(folder):
                raise SystemExit(f"{folder}: the command lines of the jobs allow no space in a folder's name")

    def write_corpora(self) -> None:
        """The three JSON-lines files that `prepare` reads, each written once."""
        step = {"student": self.every_document, "heldout": 1, "series": 4463 // self.series_documents}
        for name, source in (("student", "train"), ("heldout", "valid"), ("series", "train-more")):
            path = self.work / "corpus" / f"{name}.jsonl"
            if path.is_file():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            with partial.open("w", encoding="utf-8") as out:
                for number, text in enumerate(_texts(self.data / "novels" / f"{source}.jsonl.xz")):
                    if number % step[name] == 0:
                        out.write(json.dumps({"text": text}) + "\n")
            partial.replace(path)

    @property
    def tokens(self) -> Path:
        return self.work / "data" / "student" / "train"

    @property
    def heldout(self) -> Path:
        return self.work / "data" / "heldout" / "train"

    @property
    def slm(self) -> Path:
        return self.data / "models" / "slm-2m"

    def targets(self, name: str) -> Path:
        return self.work / "targets" / name

    def scores(self, name: str) -> Path:
        return self.work / "scores" / name

    def jobs(self, *, series: bool) -> list[Job]:
        """Everything from text to sealed stores, as jobs with needs; the series of checkpoints only if asked for."""
        for name in ("targets", "scores"):
            (self.work / name).mkdir(parents=True, exist_ok=True)  # a dump makes its store, not the folders above it
        teacher = self.data / "models" / "teacher-7m"
        exports = [self._export_series(name) for name in SERIES]
        return [
            self._prepare("student"),
            self._prepare("heldout"),
            *([self._prepare("series"), self._train_series(), *exports, self._dump_series()] if series else []),
            self._dump("teacher", teacher, "--mode top_p_k --p 0.95 --k 50 --temperatures 1.3333 1.6667 2.0"),
            self._dump("sampled", teacher, "--mode sample --set selection.num_draws=50"),
            self._score("teacher", teacher),
            self._score("slm", self.slm),
            *([self._score("early", self.work / "models" / "early", "export-early")] if series else []),
        ]

    def _job(self, name: str, words: str, *needs: str, done: Path) -> Job:
        return Job(name=name, command=("potstill", *words.split()), needs=needs, is_done=done.is_file)

    def _prepare(self, name: str) -> Job:
        output = self.work / "data" / name
        words = (
            f"prepare --input {self.work}/corpus/{name}.jsonl --output {output} --row-length {ROW_LENGTH} "
            f"--rows-per-unit 64 --tokenizer {self.data}/models/teacher-7m"
        )
        return self._job(f"prepare-{name}", words, done=output / "train" / "manifest.json")

    def _train_series(self) -> Job:
        config = self.work / "configs" / "series" / "config.json"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps({**SERIES_CONFIG, "vocab_size": 8192, "max_position_embeddings": ROW_LENGTH}))
        every = SERIES["early"]
        words = (
            f"train --preset lm --output {self.work}/runs/series --steps {SERIES['final']} --num-ranks 1 "
            f"--tokens {self.work}/data/series/train --model-config {config.parent} --set run.name=series "
            f"run.num_threads=1 data.global_batch_rows={SERIES_ROWS} data.micro_batch_rows={SERIES_ROWS} "
            f"optimizer.lr=2.5e-3 checkpoint.every_steps={every} checkpoint.keep_last={SERIES['final'] // every}"
        )
        return self._job("train-series", words, "prepare-series", done=self.work / "runs/series/done.json")

    def _export_series(self, name: str) -> Job:
        words = (
            f"export --run {self.work}/runs/series/checkpoints/step_{SERIES[name]:08d} "
            f"--output {self.work}/models/{name} --tokenizer {self.data}/models/teacher-7m --no-check"
        )
        return self._job(f"export-{name}", words, "train-series", done=self.work / "models" / name / "config.json")

    def _dump(self, name: str, model: Path, selection: str) -> Job:
        words = f"dump --tokens {self.tokens} --teacher {model} --output {self.targets(name)} {selection}"
        return self._job(f"dump-{name}", words, "prepare-student", done=self.targets(name) / "manifest.json")

    def _dump_series(self) -> Job:
        checkpoints = ",".join(str(self.work / "models" / name) for name in SERIES)
        words = (
            f"dump --tokens {self.tokens} --teacher {self.work}/models/final --output {self.targets('series')} "
            f"--mode top_p_k --p 0.95 --k 50 --set teacher.checkpoints=[{checkpoints}]"
        )
        needs = ("prepare-student", *(f"export-{name}" for name in SERIES))
        return self._job("dump-series", words, *needs, done=self.targets("series") / "final" / "manifest.json")

    def _score(self, name: str, model: Path, *needs: str) -> Job:
        words = f"score --tokens {self.tokens} --slm {model} --output {self.scores(name)}"
        needs = ("prepare-student", *needs)
        return self._job(f"score-{name}", words, *needs, done=self.scores(name) / "manifest.json")


def _texts(path: Path) -> Iterator[str]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]
