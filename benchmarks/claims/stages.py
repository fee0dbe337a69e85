"""The command lines of the stages as jobs, for the settings of the claims: each is done when its store is sealed.

A setting is a folder: corpus/ (JSON lines), data/NAME (tokens), runs/NAME and models/NAME (teachers, small models),
targets/NAME and scores/NAME.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.common.errors import UserError
from potstill.common.jobs import Job


@dataclass(frozen=True, kw_only=True)
class Lm:
    """A small Llama, how long it is trained, and at which peak rate."""

    hidden: int
    layers: int
    heads: int
    steps: int
    rows: int
    lr: float

    def config(self, row_length: int) -> dict[str, Any]:
        """As Hugging Face's config.json, without the vocabulary, which `train` takes from the store."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": -(-8 * self.hidden // 3 // 16) * 16,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": row_length,
            "tie_word_embeddings": True,
        }


@dataclass(frozen=True)
class Stages:
    """The jobs of one setting, below its folder."""

    folder: Path

    def write_corpus(self, name: str, source: Path, keep: Callable[[int], bool]) -> None:
        """Put those documents of an .xz file of JSON lines that `keep` takes by number into corpus/NAME.jsonl, once."""
        if " " in str(self.folder):
            raise UserError(f"{self.folder}: the command lines of the jobs allow no space in a folder's name")
        path = self.folder / "corpus" / f"{name}.jsonl"
        if path.is_file():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with lzma.open(source, "rt", encoding="utf-8") as lines, partial.open("w", encoding="utf-8") as out:
            out.writelines(line for number, line in enumerate(lines) if keep(number))
        partial.replace(path)

    def tokens(self, name: str) -> str:
        """The tokens store made of corpus NAME."""
        return str(self.folder / "data" / name / "train")

    def model(self, name: str) -> str:
        """The exported folder of a model trained here."""
        return str(self.folder / "models" / name)

    def targets(self, name: str) -> str:
        """A targets store."""
        return str(self.folder / "targets" / name)

    def scores(self, name: str) -> str:
        """A scores store."""
        return str(self.folder / "scores" / name)

    def _job(self, name: str, words: str, *needs: str, done: str) -> Job:
        path = self.folder / done
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        # Settings may be built side by side: a name says whose job it is, in the logs too.
        own = f"{self.folder.name}-"
        return Job(
            name=own + name,
            command=("potstill", *words.split()),
            needs=tuple(own + need for need in needs),
            is_done=path.is_file,
        )

    def prepare(self, name: str, *, row_length: int, vocab_size: int | None = None, tokenizer: str = "") -> Job:
        """Corpus NAME to tokens: with a new tokenizer of vocab_size ids, or with that of corpus `tokenizer`."""
        words = (
            f"prepare --input {self.folder}/corpus/{name}.jsonl --output {self.folder}/data/{name} "
            f"--row-length {row_length} --rows-per-unit 128 "
        )
        if vocab_size is not None:
            return self._job(
                f"prepare-{name}", words + f"--vocab-size {vocab_size}", done=f"data/{name}/train/manifest.json"
            )
        words += f"--tokenizer {self.folder}/data/{tokenizer}/tokenizer"
        return self._job(f"prepare-{name}", words, f"prepare-{tokenizer}", done=f"data/{name}/train/manifest.json")

    def train_lm(self, name: str, lm: Lm, tokens: str, *, row_length: int, heldout: str) -> list[Job]:
        """A model on the labels of corpus `tokens`, exported with its tokenizer."""
        config = self.folder / "configs" / name
        config.mkdir(parents=True, exist_ok=True)
        (config / "config.json").write_text(json.dumps(lm.config(row_length), indent=1) + "\n", encoding="utf-8")
        every = max(1, lm.steps // 4)
        words = (
            f"train --preset lm --output {self.folder}/runs/{name} --steps {lm.steps} --num-ranks 1 "
            f"--model-config {config} --tokens {self.tokens(tokens)} --set run.name={name} run.num_threads=1 "
            f"data.global_batch_rows={lm.rows} data.micro_batch_rows={lm.rows} optimizer.lr={lm.lr} "
            f"data.heldout={self.tokens(heldout)} eval.max_rows=64 eval.every_steps={every} "
            f"checkpoint.every_steps={every} checkpoint.keep_last=1"
        )
        export = (
            f"export --run {self.folder}/runs/{name} --output {self.model(name)} "
            f"--tokenizer {self.folder}/data/{tokens}/tokenizer --no-check"
        )
        needs = {f"prepare-{tokens}", f"prepare-{heldout}"}
        return [
            self._job(f"train-{name}", words, *sorted(needs), done=f"runs/{name}/done.json"),
            self._job(f"export-{name}", export, f"train-{name}", done=f"models/{name}/config.json"),
        ]

    def dump(self, name: str, tokens: str, teacher: str, selection: str) -> Job:
        """Targets NAME: of corpus `tokens` by model `teacher`."""
        words = (
            f"dump --tokens {self.tokens(tokens)} --teacher {self.model(teacher)} --output {self.targets(name)} "
            f"--batch-rows 16 {selection}"
        )
        needs = (f"prepare-{tokens}", f"export-{teacher}")
        return self._job(f"dump-{name}", words, *needs, done=f"targets/{name}/manifest.json")

    def score(self, name: str, tokens: str, slm: str) -> Job:
        """Scores NAME: of corpus `tokens` by model `slm`."""
        words = (
            f"score --tokens {self.tokens(tokens)} --slm {self.model(slm)} --output {self.scores(name)} --batch-rows 16"
        )
        needs = (f"prepare-{tokens}", f"export-{slm}")
        return self._job(f"score-{name}", words, *needs, done=f"scores/{name}/manifest.json")


def store_bytes(path: str) -> int:
    """Bytes of all files of a store."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
