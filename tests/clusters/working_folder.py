"""A working folder as the pages of docs/cluster take it for granted: rows of text, a teacher, run.yaml, templates."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from potstill.teacher_dump import DumpConfig, PrepareConfig, TrainTokenizer, prepare
from tests.clusters.pages import ROOT
from tests.teacher_dump.tiny import save_llama, some_texts, write_jsonl

TEMPLATES = ROOT / "launch" / "templates"
BIN = Path(sys.executable).parent
HIDDEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "JOB_COMPLETION_INDEX")
ROW_LENGTH = 32
STUDENT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def make_folder(folder: Path, *, num_texts: int = 400, rows_per_unit: int = 16, **run: Any) -> Path:
    """data/train, models/teacher, run.yaml and the templates in `folder`; `run` adds to the groups of run.yaml."""
    write_jsonl(folder / "texts.jsonl", some_texts(num_texts))
    prepare(
        PrepareConfig(
            input=[folder / "texts.jsonl"],
            output=folder / "data",
            train_tokenizer=TrainTokenizer(vocab_size=300),
            row_length=ROW_LENGTH,
            rows_per_unit=rows_per_unit,
            heldout_fraction=0.1,
        )
    )
    save_llama(folder / "models" / "teacher", vocab_size=300)
    for file in (folder / "data" / "tokenizer").iterdir():
        shutil.copy(file, folder / "models" / "teacher")
    for template in TEMPLATES.iterdir():
        shutil.copy(template, folder)
    tree: dict[str, Any] = {
        "run": {"output_dir": "runs/mine", "max_steps": 8, "num_threads": 1},
        "model": {"config": STUDENT},
        "data": {
            "tokens": "data/train",
            "targets": {"teacher": "data/targets"},
            "global_batch_rows": 4,
            "micro_batch_rows": 2,
        },
        "curriculum": [{"targets": "teacher"}],
        "optimizer": {"lr": 3e-3},
        "schedule": {"kind": "wsd", "warmup": 2, "decay": 2},
        "logging": {"every_steps": 1},
        "zero_stage": 1,
    }
    for group, values in run.items():
        tree[group] = {**tree.get(group, {}), **values} if isinstance(values, dict) else values
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder


def dump_config(folder: Path, output: str = "data/targets") -> DumpConfig:
    """What the pages dump, with paths that hold in any folder."""
    teacher = {"model": folder / "models" / "teacher"}
    return DumpConfig(tokens=folder / "data" / "train", output=folder / output, teacher=teacher)


def environment(**values: object) -> dict[str, str]:
    """That of a person at a shell of this machine: our programs on the path, nothing that a launcher has set."""
    kept = {name: value for name, value in os.environ.items() if name not in HIDDEN and "SLURM" not in name}
    kept |= {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return kept | {name: str(value) for name, value in values.items()}


@contextmanager
def started(
    command: list[str], *, folder: Path, output: Path, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The running command, which writes to `output`; what is left of its process group at the end is killed."""
    with output.open("ab") as sink:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(env) if env is not None else environment(),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def run(
    command: list[str], *, folder: Path, output: Path, seconds: float = 150.0, env: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Exit code and all that the command has said."""
    with started(command, folder=folder, output=output, env=env) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{command} was not done after {seconds} s:\n{output.read_text()[-4000:]}") from None
    return process.returncode, output.read_text(errors="replace")


def shell(line: str, **options: Any) -> tuple[int, str]:
    """A line of a page, typed into bash."""
    return run(["bash", "-c", line], **options)


def wait_until(ready: Callable[[], object], *, seconds: float, what: str, alive: Any = None) -> None:
    """Wait for a condition; AssertionError when it takes too long, or when the process that brings it about ends."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        assert alive is None or alive.poll() is None, f"{what}: the process has ended with {alive.poll()} before"
        time.sleep(0.05)
