"""Settings in which a teacher's accuracy jumps, and its checkpoints become stores: for progressive distillation.

A setting (parity.py, grammar.py) says what its examples are: short rows of tokens of which few positions are trained
on. Several examples share a row of the store as documents, so that a batch is a few rows. Everything is made by
potstill's commands: `import tokens`, `train` (the teacher, with permanent checkpoints), `export`, `dump`. The teacher
is chosen by its own curve of accuracy, before any student is trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml
from numpy.typing import NDArray

from benchmarks.claims.base import Bench
from potstill.common.errors import UserError
from potstill.common.jobs import Job
from potstill.student_train.run.metrics import read_metrics
from potstill.student_train.run.run_folder import read_done

Ints = NDArray[np.int32]

# Shares of the way from what a plain guess scores to the teacher's end: where the jump begins, and where it is over.
BEGINS, LEARNED = 0.1, 0.9
SATURATED = 0.4  # the jump must be over at this share of the teacher's steps


@dataclass(frozen=True, kw_only=True)
class Net:
    """A GPT-2: `heads` heads of 8, one layer unless said."""

    heads: int
    lr: float
    layers: int = 1

    def config(self, length: int, vocab_size: int) -> dict[str, Any]:
        """As Hugging Face's config.json, without dropout; the last id stands for every special token."""
        return {
            "model_type": "gpt2",
            "n_embd": 8 * self.heads,
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_positions": length,
            "vocab_size": vocab_size,
            "activation_function": "gelu_pytorch_tanh",
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": vocab_size - 1,
            "eos_token_id": vocab_size - 1,
        }


@dataclass(frozen=True, kw_only=True)
class JumpSize:
    """Numbers of a setting.

    refresh: about so many steps between two checkpoints of the series; save_every: between two of the teacher; first:
    steps that the arms with one early checkpoint learn from it; cap: steps of a student; near: how far the
    accuracy of the inside checkpoint may lie from where it should.
    """

    examples: int
    heldout: int
    teacher: Net
    student: Net
    teacher_seeds: tuple[int, ...]
    teacher_steps: int
    save_every: int
    refresh: int
    first: int
    cap: int
    eval_every: int
    near: float
    batch_rows: int = 8
    examples_in_row: int = 8

    @property
    def jump_by(self) -> int:
        """Step by which the teacher's jump must be over."""
        return round(SATURATED * self.teacher_steps)


@dataclass(frozen=True)
class Curve:
    """Accuracy of a teacher at its checkpoints: (step, accuracy), in order.

    floor: what a plain guess scores; top: what the teacher comes to; middle: the share of the way between them at which
    the inside checkpoint is looked for.
    """

    points: tuple[tuple[int, float], ...]
    floor: float = 0.5
    top: float = 1.0
    middle: float = 0.3

    def at(self, share: float) -> float:
        """The accuracy at a share of the way from the floor to the top."""
        return self.floor + share * (self.top - self.floor)

    @property
    def learned(self) -> int | None:
        """The first step from which on it has learned; None: it has not."""
        late = [step for step, accuracy in self.points if accuracy < self.at(LEARNED)]
        after = [step for step, _ in self.points if not late or step > late[-1]]
        return after[0] if after else None

    @property
    def begins(self) -> int:
        """The last step before it has learned at which it is hardly above its floor: there the jump begins."""
        end = self.learned or self.points[-1][0]
        return max((step for step, accuracy in self.points if accuracy < self.at(BEGINS) and step < end), default=0)

    @property
    def inside(self) -> int:
        """The step of the jump at which the accuracy is nearest to that of the inside."""
        end = self.learned or self.points[-1][0]
        jump = [point for point in self.points if self.begins < point[0] < end]
        return min(jump or self.points, key=lambda point: abs(point[1] - self.at(self.middle)))[0]


@dataclass(frozen=True)
class Jump(ABC):
    """A setting below a bench's folder: the jobs that make it, and where it stands."""

    bench: Bench

    name: ClassVar[str]
    words: ClassVar[tuple[str, ...]]  # the vocabulary; the last word stands for every special token
    objective: ClassVar[dict[str, Any]] = {}  # of the students, beside alpha 1

    @property
    @abstractmethod
    def size(self) -> JumpSize:
        """The numbers of the bench's scale."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens of an example."""

    @abstractmethod
    def examples(self, random: np.random.Generator, count: int) -> tuple[Ints, Ints]:
        """Ids [count, length] and, as 1, the positions trained on."""

    @abstractmethod
    def measured(self, points: Sequence[tuple[int, float]]) -> Curve:
        """A teacher's curve with its floor and its top."""

    @cached_property
    def folder(self) -> Path:
        """Below which all of it stands."""
        return self.bench.folder(self.name)

    @property
    def row_length(self) -> int:
        """Tokens of a row of the stores."""
        return self.size.examples_in_row * self.length

    def tokens(self, part: str) -> Path:
        """Tokens store: `train` or `heldout`."""
        return self.folder / "data" / part / "train"

    def targets(self, step: int) -> Path:
        """Targets store of the teacher's checkpoint of that step."""
        return self.folder / "targets" / f"step_{step}"

    def run_tree(self, net: Net, *, steps: int, every: int) -> dict[str, Any]:
        """The configuration that all runs share: data, batch, optimizer, evaluations."""
        return {
            "run": {"max_steps": steps, "num_threads": 1},
            "model": {"config": net.config(self.row_length, len(self.words)), "init": "width"},
            "data": {
                "tokens": str(self.tokens("train")),
                "heldout": str(self.tokens("heldout")),
                "global_batch_rows": self.size.batch_rows,
                "micro_batch_rows": self.size.batch_rows,
                "order": "block",
            },
            "optimizer": {"lr": net.lr, "betas": [0.9, 0.95], "weight_decay": 0.0},
            "schedule": {"kind": "constant", "warmup": min(100, self.size.cap // 4)},
            "logging": {"every_steps": every},
            "eval": {"every_steps": every},
            "zero_stage": 0,
        }

    def write_tables(self) -> None:
        """The examples as tables of ids and masks, and a tokenizer of the words, once."""
        import pyarrow as pa
        import pyarrow.parquet as pq
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        size, random, special = self.size, np.random.Generator(np.random.Philox(7)), self.words[-1]
        if (self.folder / "heldout.parquet").is_file():
            return
        words = Tokenizer(models.WordLevel({word: id for id, word in enumerate(self.words)}, unk_token=special))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token=special).save_pretrained(self.folder / "tokenizer")
        for part, count in (("train", size.examples), ("heldout", size.heldout)):
            ids, mask = self.examples(random, count)
            table = pa.table({"input_ids": list(ids), "loss_mask": list(mask)})
            pq.write_table(table, self.folder / f"{part}.parquet")

    def import_jobs(self) -> list[Job]:
        """Tables to tokens stores."""
        options = ("--tokenizer", str(self.folder / "tokenizer"), "--mask-column", "loss_mask", "--packing", "whole")
        return [
            Job(
                name=f"{self.name}-import-{part}",
                command=("potstill", "import", "tokens", "--input", str(self.folder / f"{part}.parquet"), "--output",
                         str(self.folder / "data" / part), "--row-length", str(self.row_length), *options,
                         "--set", "heldout_fraction=0"),
                is_done=(self.tokens(part) / "manifest.json").is_file,
            )
            for part in ("train", "heldout")
        ]  # fmt: skip

    def teacher_job(self, seed: int, steps: int) -> Job:
        """One teacher to step `steps`, or on to there, with a checkpoint at each evaluation."""
        size, folder = self.size, self.folder / "teachers" / str(seed)
        tree = self.run_tree(size.teacher, steps=steps, every=size.save_every)
        tree["run"] |= {"output_dir": str(folder), "seed": 1000 + seed}
        tree["checkpoint"] = {"every_steps": size.save_every, "permanent_every_steps": size.save_every}
        path = self.folder / "configs" / f"teacher_{seed}_{steps}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        return Job(
            name=f"{self.name}-teacher-{seed}-{steps}",
            command=("potstill", "train", "--config", str(path), "--num-ranks", "1"),
            is_done=lambda: self.done_steps(seed) >= steps,
        )

    def done_steps(self, seed: int) -> int:
        """Steps of a teacher's finished run; 0 where there is none."""
        done = read_done(self.folder / "teachers" / str(seed))
        return 0 if done is None else int(done["step"])

    def curve(self, seed: int) -> Curve:
        """The accuracy of a finished teacher."""
        records = [record for record in read_metrics(self.folder / "teachers" / str(seed)) if record["kind"] == "eval"]
        return self.measured([(record["step"], record["accuracy"]) for record in records])

    def is_fit(self, curve: Curve) -> bool:
        """Whether its jump is over early enough to be saturated at the end, and a checkpoint lies inside."""
        learned = curve.learned
        if learned is None or learned > self.size.jump_by:
            return False
        return abs(dict(curve.points)[curve.inside] - curve.at(curve.middle)) <= self.size.near

    @cached_property
    def teacher(self) -> int:
        """Seed of the first teacher that is fit. Raises UserError: none is."""
        for seed in self.size.teacher_seeds:
            if self.done_steps(seed) == self.size.teacher_steps and self.is_fit(self.curve(seed)):
                return seed
        seeds = self.size.teacher_seeds
        raise UserError(f"{self.folder}: no teacher of the seeds {seeds} learns {self.name} as it should")

    @property
    def goal(self) -> float:
        """Accuracy at which a student has learned: the share of the way to its teacher's end."""
        return self.curve(self.teacher).at(LEARNED)

    @cached_property
    def refresh(self) -> int:
        """Steps between two checkpoints of the series: about size.refresh, so that the inside one is of the series."""
        every = self.size.save_every
        parts = range(max(1, self.inside // (2 * self.size.refresh)), max(2, 2 * self.inside // self.size.refresh))
        fits = sorted(parts, key=lambda n: (self.inside % (n * every), abs(self.inside / n - self.size.refresh)))
        return max(every, self.inside // fits[0] // every * every)

    @cached_property
    def series(self) -> tuple[int, ...]:
        """Steps of the checkpoints of the series: each `refresh` steps to the end of the jump, and the last."""
        learned, last = self.curve(self.teacher).learned or 0, self.size.teacher_steps
        inside = self.inside // self.refresh * self.refresh
        steps = (self.inside if step == inside else step for step in range(self.refresh, learned, self.refresh))
        return (*steps, last)

    @cached_property
    def inside(self) -> int:
        """Step of the checkpoint from inside the jump."""
        return self.curve(self.teacher).inside

    @cached_property
    def before(self) -> int:
        """Step of the control: half way to where the jump begins."""
        every = self.size.save_every
        return max(every, self.curve(self.teacher).begins // 2 // every * every)

    def store_jobs(self) -> list[Job]:
        """Export and dump every checkpoint that an arm learns from."""
        jobs, run = [], self.folder / "teachers" / str(self.teacher)
        for step in sorted({*self.series, self.inside, self.before}):
            model = self.folder / "models" / f"step_{step}"
            jobs.append(
                Job(
                    name=f"{self.name}-export-{step}",
                    command=("potstill", "export", "--run", str(run / "checkpoints" / f"step_{step:08d}"),
                             "--output-dir", str(model), "--tokenizer", str(self.folder / "tokenizer"), "--no-check"),
                    is_done=(model / "config.json").is_file,
                )
            )  # fmt: skip
            jobs.append(
                Job(
                    name=f"{self.name}-dump-{step}",
                    command=("potstill", "dump", "--tokens", str(self.tokens("train")), "--output",
                             str(self.targets(step)), "--teacher", str(model), "--mode", "top_k", "--k", "3",
                             "--batch-rows", "32"),
                    needs=(f"{self.name}-export-{step}",),
                    is_done=(self.targets(step) / "manifest.json").is_file,
                )
            )  # fmt: skip
        return jobs

    def build(self) -> Iterator[list[Job]]:
        """All jobs: examples, teachers until one is fit, the stores of its checkpoints."""
        self.write_tables()
        yield self.import_jobs()
        seeds = self.size.teacher_seeds
        for first in range(0, len(seeds), 2):
            pair = seeds[first : first + 2]  # one for each core
            yield [self.teacher_job(seed, self.size.jump_by) for seed in pair if not self.done_steps(seed)]
            for seed in (seed for seed in pair if self.is_fit(self.curve(seed))):
                yield [self.teacher_job(seed, self.size.teacher_steps)]
                if self.is_fit(self.curve(seed)):  # its top may have moved since
                    yield self.store_jobs()
                    return
        yield self.store_jobs()  # says that there is no teacher
