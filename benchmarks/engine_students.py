"""Does a dump by engine vllm teach what one by engine hf teaches? Students over seeds, from stores of both.

    python -m benchmarks.engine_students --vllm-python .venv-vllm/bin/python [--output benchmarks/results]

Novels and `teacher-7m` of ../shared/data; five stores of the same rows: engine hf in float32 and bfloat16, engine vllm
in both, and none (labels). Students differ in the store alone. The rule, set before the first run: at either dtype the
95 % interval of the paired differences of the final loss, vllm minus hf, lies within one standard deviation of hf's own
losses over the seeds; and labels end further from hf than that, or the comparison could not have shown a difference.
Engine vllm is run by another Python, which has it (`make test-vllm` makes one): the stores are all that passes between
them. What is done is not done again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.about import about
from benchmarks.claims.__main__ import SEEDS, parse_seeds
from benchmarks.claims.base import Arm, Bench, Finding, Table
from benchmarks.claims.paired import mean_and_sd
from benchmarks.claims.runs import Runs, run_arms, run_jobs
from benchmarks.claims.stages import Stages
from potstill.common.errors import UserError
from potstill.common.jobs import Job, JobRunner, say
from potstill.common.processes import start
from potstill.common.spread import Spread, differences
from potstill.common.text_tables import table
from potstill.storage import StoreReader

ROW_LENGTH, STEPS, ROWS = 256, 300, 4
DTYPES = ("float32", "bfloat16")
SELECTION = "--mode top_p_k --p 0.98 --k 64"
STUDENT = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": ROW_LENGTH,
    "tie_word_embeddings": True,
}
# Where one process runs vLLM on a CPU; on a GPU none of them is read.
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_PLUGINS": "",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def store_name(engine: str, dtype: str) -> str:
    """Of a store and of the arm that learns from it."""
    return f"{engine}-{dtype}"


def prepare_jobs(stages: Stages, bench: Bench) -> list[Job]:
    """The text of the students and what is held out, in rows of the teacher's tokenizer."""
    stages.write_corpus("train", bench.data / "novels/train.jsonl.xz", lambda n: n % 5 == 0)
    stages.write_corpus("heldout", bench.data / "novels/valid.jsonl.xz", lambda n: n % 4 == 0)
    return [
        Job(
            name=f"prepare-{name}",
            command=(
                *("potstill", "prepare", "--input", f"{stages.folder}/corpus/{name}.jsonl"),
                *("--output", f"{stages.folder}/data/{name}", "--tokenizer", str(teacher_of(bench))),
                *("--row-length", str(ROW_LENGTH), "--rows-per-unit", "128"),
            ),
            is_done=(stages.folder / "data" / name / "train" / "manifest.json").is_file,
        )
        for name in ("train", "heldout")
    ]


def teacher_of(bench: Bench) -> Path:
    """The teacher's folder."""
    return bench.data / "models" / "teacher-7m"


def dump_jobs(stages: Stages, bench: Bench, engine: str) -> list[Job]:
    """One store for each dtype."""
    return [
        Job(
            name=f"dump-{store_name(engine, dtype)}",
            command=(
                *("potstill", "dump", "--tokens", stages.tokens("train"), "--teacher", str(teacher_of(bench))),
                *("--output", stages.targets(store_name(engine, dtype)), "--engine", engine, "--dtype", dtype),
                *("--batch-rows", "16", *SELECTION.split()),
            ),
            is_done=Path(stages.targets(store_name(engine, dtype)), "manifest.json").is_file,
        )
        for dtype in DTYPES
    ]


def run_vllm(jobs: Sequence[Job], bench: Bench, python: Path) -> None:
    """Run dumps by a Python that has vLLM. Raises UserError: there is none, or a job failed."""
    if not python.is_file():
        raise UserError(f"--vllm-python {python} is not there; `make test-vllm` makes one at .venv-vllm/bin/python")
    source = str(Path(__file__).resolve().parents[1] / "src")
    environment = {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | VLLM_ENVIRONMENT

    def starter(words: Any, output: Path) -> Any:
        return start([str(python), "-m", "potstill.launch", *words], environment=environment, output=output)

    JobRunner(list(jobs), starter=starter, slots=1, log_folder=bench.work / "logs", show=say).run()


def arms_of(stages: Stages) -> dict[str, Arm]:
    """Labels, and KD from each store."""
    found = {"labels": Arm(config=student(stages, None))}
    names = [store_name(engine, dtype) for dtype in DTYPES for engine in ("hf", "vllm")]
    return found | {name: Arm(config=student(stages, name)) for name in names}


def student(stages: Stages, targets: str | None) -> dict[str, Any]:
    """A run's configuration; `targets` is all that differs."""
    tree: dict[str, Any] = {
        "run": {"name": "engines", "max_steps": STEPS, "num_threads": 1},
        "model": {"config": STUDENT},
        "data": {
            "tokens": stages.tokens("train"),
            "heldout": stages.tokens("heldout"),
            "global_batch_rows": ROWS,
            "micro_batch_rows": ROWS,
        },
        "optimizer": {"lr": 6e-3},
        "schedule": {"kind": "cosine", "warmup": 0.05, "min_ratio": 0.05},
        "eval": {"every_steps": STEPS // 6, "max_rows": 64},
        "checkpoint": {"keep_last": 1},
    }
    if targets is not None:
        tree["data"]["targets"] = {"teacher": stages.targets(targets)}
        tree["objective"] = {"alpha": 1.0}
        tree["curriculum"] = [{"targets": "teacher"}]
    return tree


def findings(loss: dict[str, list[float]]) -> list[Finding]:
    """The rule of the head, by dtype: final losses by seed of each arm."""
    found = []
    for dtype in DTYPES:
        ours, theirs = loss[store_name("vllm", dtype)], loss[store_name("hf", dtype)]
        noise = Spread.of(theirs).sd
        gap = differences(ours, theirs)
        low, high = Spread.of(gap).interval()
        away = differences(loss["labels"], theirs)
        found += [
            Finding(
                text=f"{dtype}: vllm minus hf lies within the spread of hf over seeds ({noise:.4f})",
                passed=-noise < low and high < noise,
                effect=Spread.of(gap).mean,
                unit="nats",
                values=tuple(gap),
                interval=(low, high),
            ),
            Finding(
                text=f"{dtype}: labels end further from hf than that, so a difference could show",
                passed=min(map(abs, Spread.of(away).interval())) > noise,
                effect=Spread.of(away).mean,
                unit="nats",
                values=tuple(away),
                interval=Spread.of(away).interval(),
            ),
        ]
    return found


def store_table(stages: Stages) -> Table:
    """What the stores themselves hold."""
    rows = []
    for name in (store_name(engine, dtype) for dtype in DTYPES for engine in ("hf", "vllm")):
        reader = StoreReader(stages.targets(name))
        assert reader.manifest is not None
        per_token = reader.manifest.num_bytes / reader.num_tokens
        rows.append((name, f"{reader.num_tokens}", f"{per_token:.2f}", reader.manifest.store_digest[:12]))
    return Table(title="Stores", header=("store", "tokens", "bytes a token", "digest"), rows=tuple(rows))


def told(runs: Runs, stages: Stages) -> tuple[str, dict[str, Any]]:
    """The result as text and as JSON."""
    loss = {name: runs.final(name) for name in runs.arms}
    found = findings(loss)
    stores = store_table(stages)
    lines = [
        table(
            ["arm", *(str(seed) for seed in runs.bench.seeds), "mean"],
            [(name, *(f"{value:.4f}" for value in values), mean_and_sd(values)) for name, values in loss.items()],
        ),
        "",
        table(list(stores.header), list(stores.rows)),
        "",
    ]
    for one in found:
        assert one.interval is not None
        low, high = one.interval
        lines.append(
            f"{'yes' if one.passed else 'NO '}  {one.text}: {one.effect:+.5f} nats, 95 % {low:+.5f} to {high:+.5f}"
        )
    figures = {
        "benchmark": "engine_students",
        "pass": all(one.passed for one in found),
        "seeds": list(runs.bench.seeds),
        "losses": {name: [round(value, 6) for value in values] for name, values in loss.items()},
        "findings": [{"text": one.text, "passed": one.passed, "effect": one.effect} for one in found],
        "curves": {name: [[round(y, 4) for _, y in curve] for curve in runs.curves(name)] for name in runs.arms},
        "made_with": runs.made_with(),
        **about(),
    }
    return "\n".join(lines), figures


def main() -> int:
    """Make the stores, run the students, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, default=Path(".venv-vllm/bin/python"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/engine_students"))
    parser.add_argument("--seeds", type=parse_seeds, default=SEEDS)
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, help="folder for engine_students.md and .json")
    arguments = parser.parse_args()
    bench = Bench(work=arguments.work.absolute(), data=arguments.data.absolute(), scale="cpu", seeds=arguments.seeds)
    if not teacher_of(bench).is_dir():
        parser.error(f"{teacher_of(bench)} is not there; name the folder of texts and models with --data")
    stages = Stages(bench.folder("engines"))
    try:
        run_jobs(prepare_jobs(stages, bench), bench.work, arguments.parallel)
        run_vllm(dump_jobs(stages, bench, "vllm"), bench, arguments.vllm_python)
        run_jobs(dump_jobs(stages, bench, "hf"), bench.work, arguments.parallel)
        runs = run_arms(bench, arms_of(stages), arguments.parallel, any_source=False)
    except UserError as error:
        print(f"engine_students: {error}", file=sys.stderr)
        return 1
    text, figures = told(runs, stages)
    print(text)
    if arguments.output is not None:
        page = f"# Students from stores of two engines\n\n{figures['date']}, commit {figures['commit']}, "
        page += f"{figures['machine']}. Not measured on a GPU.\n\n```\n{text}\n```\n"
        (arguments.output / "engine_students.md").write_text(page, encoding="utf-8")
        written = json.dumps(figures, indent=1) + "\n"
        (arguments.output / "engine_students.json").write_text(written, encoding="utf-8")
    print(json.dumps(figures))
    return 0 if figures["pass"] else 1


if __name__ == "__main__":
    sys.exit(main())
