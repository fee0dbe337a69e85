"""The setting of the claims `selector` and `targets`: noisy and clean novels, a teacher, a small model, their stores.

`train` is English novels of which 56 % of the characters are noise (log lines, base64, scans, one sentence over and
over, boilerplate, words in random order), `clean` is novels without; what is held out is clean. A run reads either
once, so that all seeds see the same text. Tokenizer, teacher and `small`, a small model, are made on clean text of
other books; `reference` is as small and has read the noisy text itself, as the reference of difference sampling has.
The vocabulary is small, so that nearly all of it can be stored for every token (a store keeps at most 255 entries).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.claims.base import Bench
from benchmarks.claims.stages import Lm, Stages
from potstill.common.jobs import Job

NEEDS = ("novels", "noisy")
ROW_LENGTH = 256
EVALUATIONS = 12


@dataclass(frozen=True, kw_only=True)
class Size:
    """Numbers of a scale. *_documents: of so many documents of the file one is taken (a prime spreads them)."""

    vocab_size: int
    teacher_documents: int
    noisy_documents: int
    clean_documents: int
    teacher: Lm
    small: Lm
    student: Lm
    heldout_rows: int = 64


SIZES = {
    "quick": Size(
        vocab_size=300,
        teacher_documents=89,
        noisy_documents=41,
        clean_documents=89,
        teacher=Lm(hidden=32, layers=1, heads=2, steps=12, rows=4, lr=5e-3),
        small=Lm(hidden=16, layers=1, heads=2, steps=8, rows=4, lr=5e-3),
        student=Lm(hidden=16, layers=1, heads=2, steps=12, rows=2, lr=5e-3),
        heldout_rows=8,
    ),
    "cpu": Size(
        vocab_size=512,
        teacher_documents=5,
        noisy_documents=6,
        clean_documents=10,
        teacher=Lm(hidden=96, layers=3, heads=3, steps=600, rows=4, lr=5e-3),
        small=Lm(hidden=48, layers=2, heads=2, steps=300, rows=2, lr=6e-3),
        student=Lm(hidden=64, layers=2, heads=2, steps=300, rows=4, lr=6e-3),
    ),
    "gpu": Size(
        vocab_size=512,
        teacher_documents=1,
        noisy_documents=1,
        clean_documents=2,
        teacher=Lm(hidden=512, layers=6, heads=8, steps=3000, rows=16, lr=1e-3),
        small=Lm(hidden=128, layers=2, heads=2, steps=1500, rows=16, lr=3e-3),
        student=Lm(hidden=256, layers=4, heads=4, steps=940, rows=8, lr=2e-3),
        heldout_rows=256,
    ),
}


@dataclass(frozen=True)
class Noisy:
    """The setting at the bench's scale."""

    bench: Bench

    @property
    def size(self) -> Size:
        """Its numbers."""
        return SIZES[self.bench.scale]

    @property
    def stages(self) -> Stages:
        """Its folder and commands."""
        return Stages(self.bench.folder("noisy"))

    def corpora(self) -> None:
        """Write the four texts."""
        size, data, stages = self.size, self.bench.data, self.stages
        stages.write_corpus("teacher", data / "novels/train-more.jsonl.xz", lambda n: n % size.teacher_documents == 0)
        stages.write_corpus("noisy", data / "noisy/train.jsonl.xz", lambda n: n % size.noisy_documents == 0)
        stages.write_corpus("clean", data / "novels/train.jsonl.xz", lambda n: n % size.clean_documents == 0)
        stages.write_corpus("heldout", data / "novels/valid.jsonl.xz", lambda n: n % 4 == 0)

    def models(self) -> list[Job]:
        """Tokens, tokenizer, teacher and the two small models."""
        size, stages = self.size, self.stages
        return [
            stages.prepare("teacher", row_length=ROW_LENGTH, vocab_size=size.vocab_size),
            *(stages.prepare(n, row_length=ROW_LENGTH, tokenizer="teacher") for n in ("heldout", "noisy", "clean")),
            *stages.train_lm("small", size.small, "teacher", row_length=ROW_LENGTH, heldout="heldout"),
            *stages.train_lm("reference", size.small, "noisy", row_length=ROW_LENGTH, heldout="heldout"),
            *stages.train_lm("teacher", size.teacher, "teacher", row_length=ROW_LENGTH, heldout="heldout"),
        ]

    def student(
        self,
        text: str,
        *,
        targets: str | None = None,
        stage: dict[str, Any] | None = None,
        objective: dict[str, Any] | None = None,
        scores: tuple[str, ...] = (),
        **optimizer: Any,
    ) -> dict[str, Any]:
        """The configuration of a run over corpus `text`: all arms share all that is not named here."""
        lm, stages = self.size.student, self.stages
        data: dict[str, Any] = {
            "tokens": stages.tokens(text),
            "heldout": stages.tokens("heldout"),
            "global_batch_rows": lm.rows,
            "micro_batch_rows": lm.rows,
        }
        if targets is not None:
            data["targets"] = {"teacher": stages.targets(targets)}
        if scores:
            data["scores"] = {name: stages.scores(name) for name in scores}
        tree: dict[str, Any] = {
            "run": {"name": "claim", "max_steps": lm.steps, "num_threads": 1},
            "model": {"config": lm.config(ROW_LENGTH)},
            "data": data,
            "optimizer": {"lr": lm.lr, **optimizer},
            "schedule": {"kind": "cosine", "warmup": 0.05, "min_ratio": 0.05},
            "eval": {"every_steps": max(1, lm.steps // EVALUATIONS), "max_rows": self.size.heldout_rows},
            "checkpoint": {"keep_last": 1},
        }
        if targets is not None or stage is not None:
            tree["objective"] = objective or {}
            tree["curriculum"] = [{**({"targets": "teacher"} if targets else {}), **(stage or {})}]
        return tree


def build_models(bench: Bench) -> Iterator[list[Job]]:
    """What both claims read: text, tokenizer, teacher and small model."""
    setting = Noisy(bench)
    setting.corpora()
    yield setting.models()
