"""Initial weights by width: the rules of `model.init` over seeds and hidden sizes, on labels only.

    python -m benchmarks.init_rules --work runs/init --output benchmarks/results/init_rules.md

The text is that of the demo without its noise (the source of Python's standard library), in rows of 256 tokens. Each
run is `potstill train`, so what is measured is what a user gets. Printed are, for each hidden size and rule, the mean
and the standard deviation over seeds of the held-out loss at the end; the last line is JSON. What is done is not done
again: the command repeated continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.about import about, about_line
from benchmarks.claims.runs import run_jobs
from potstill.common.jobs import Job
from potstill.common.text_tables import table
from potstill.launch.cli import main as potstill
from potstill.launch.demo.corpus import write_corpus

RULES = ("config", "width", "width_residual")
NAMES = {
    "config": "0.02 (transformers)",
    "width": "1/sqrt(hidden)",
    "width_residual": "1/sqrt(hidden), residual / sqrt(2 layers)",
}
ROW_LENGTH, VOCAB_SIZE = 256, 2048


@dataclass(frozen=True)
class Size:
    """One student: its shape, how long it is trained, rows of a batch, peak learning rate."""

    hidden: int
    layers: int
    steps: int
    batch_rows: int
    lr: float

    @property
    def name(self) -> str:
        """What tells it apart in the name of a run."""
        return f"h{self.hidden}x{self.layers}-s{self.steps}x{self.batch_rows}-lr{self.lr:g}"

    def config(self) -> dict[str, Any]:
        """As Hugging Face's config.json; nothing is said of initial weights."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.hidden * 8 // 3,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 32,
            "num_key_value_heads": self.hidden // 32,
            "max_position_embeddings": ROW_LENGTH,
            "tie_word_embeddings": True,
        }


# 96 is the demo's student of the first version: its size, steps, batch and learning rate.
SIZES = (
    Size(64, 2, 300, 4, 4e-3),
    Size(96, 2, 300, 8, 3e-3),
    Size(128, 2, 300, 4, 3e-3),
    Size(256, 4, 200, 4, 2e-3),
)


@dataclass(frozen=True)
class Grid:
    """All runs below one folder."""

    work: Path
    sizes: tuple[Size, ...]
    seeds: tuple[int, ...]
    rules: tuple[str, ...] = RULES

    def prepare(self) -> None:
        """Text and tokens stores, made once."""
        corpus = self.work / "corpus" / "library.jsonl"
        if not corpus.is_file():
            write_corpus(corpus, max_bytes=2_600_000)
        if not (self.work / "data" / "heldout" / "manifest.json").is_file():
            words = f"prepare --row-length {ROW_LENGTH} --vocab-size {VOCAB_SIZE} --heldout-fraction 0.05".split()
            code = potstill([*words, "--input", str(corpus.parent), "--output", str(self.work / "data")])
            if code:
                raise SystemExit(code)

    def folder(self, size: Size, rule: str, seed: int) -> Path:
        """Where a run stands; its name says all that makes it different."""
        return self.work / "runs" / f"{size.name}-{rule}-{seed}"

    def jobs(self) -> list[Job]:
        """One run for each seed, size and rule, a seed of everything first."""
        return [self._job(size, rule, seed) for seed in self.seeds for size in self.sizes for rule in self.rules]

    def _job(self, size: Size, rule: str, seed: int) -> Job:
        folder = self.folder(size, rule, seed)
        tree = {
            "run": {"name": folder.name, "output_dir": str(folder), "seed": seed, "max_steps": size.steps},
            "model": {"config": size.config(), "init": rule},
            "data": {
                "tokens": str(self.work / "data" / "train"),
                "heldout": str(self.work / "data" / "heldout"),
                "global_batch_rows": size.batch_rows,
                "micro_batch_rows": size.batch_rows,
            },
            "optimizer": {"lr": size.lr},
            "schedule": {"kind": "cosine", "warmup": 0.05, "min_ratio": 0.05},
            "checkpoint": {"keep_last": 1},
        }
        path = self.work / "configs" / f"{folder.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        command = ("potstill", "train", "--config", str(path), "--num-ranks", "1")
        return Job(name=folder.name, command=command, is_done=(folder / "done.json").is_file)

    def losses(self, size: Size, rule: str) -> list[float]:
        """Held-out loss at the end of each finished run, in the order of the seeds."""
        done = [self.folder(size, rule, seed) / "done.json" for seed in self.seeds]
        found = [json.loads(path.read_text(encoding="utf-8")) for path in done if path.is_file()]
        return [float(record["heldout"]["heldout_loss"]) for record in found]


def figures(grid: Grid) -> list[dict[str, Any]]:
    """Mean, standard deviation and range for each size and rule."""
    rows = []
    for size in grid.sizes:
        for rule in grid.rules:
            losses = grid.losses(size, rule)
            if len(losses) > 1:
                spread = {"mean": statistics.mean(losses), "sd": statistics.stdev(losses)}
                rows.append({"hidden": size.hidden, "layers": size.layers, "rule": rule, **spread, "losses": losses})
    return rows


def format_table(rows: list[dict[str, Any]]) -> str:
    """The table that is printed and kept."""
    cells = [
        (
            f"{row['hidden']} x {row['layers']}",
            NAMES[row["rule"]],
            f"{row['mean']:.4f}",
            f"{row['sd']:.4f}",
            " ".join(f"{loss:.4f}" for loss in row["losses"]),
        )
        for row in rows
    ]
    return table(["hidden x layers", "std", "mean", "sd", "held-out loss by seed"], cells, align="<<>><")


def main() -> None:
    """Run the grid and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/init"), help="folder of the runs (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to N (default %(default)s)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[size.hidden for size in SIZES], help="hidden sizes")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file, and JSON beside it")
    arguments = parser.parse_args()
    sizes = tuple(size for size in SIZES if size.hidden in arguments.hidden)
    grid = Grid(arguments.work, sizes, tuple(range(1, arguments.seeds + 1)))
    grid.prepare()
    run_jobs(grid.jobs(), grid.work, arguments.parallel)
    rows = figures(grid)
    print(format_table(rows))
    result = {"benchmark": "init_rules", **about(), "rows": rows}
    if arguments.output is not None:
        write_report(arguments.output, rows, result)
    print(json.dumps(result))


def write_report(path: Path, rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """The table as Markdown, with how it was made, and the same as JSON."""
    text = [
        "# Initial weights by width",
        "",
        about_line(),
        "",
        f"    python -m benchmarks.init_rules --work FOLDER --output {path}",
        "",
        "Llama students on labels only, Python's standard library as text, vocabulary 2048, rows of 256 tokens. "
        "Held-out loss in nats per token at the end, mean and standard deviation over seeds; steps x rows, peak rate:",
        *(f"hidden {size.hidden}: {size.steps} x {size.batch_rows}, {size.lr:g}." for size in SIZES),
        "",
        *(f"    {line}" for line in format_table(rows).splitlines()),
        "",
    ]
    path.write_text("\n".join(text), encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
