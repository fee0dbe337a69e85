"""Input that nobody here wrote: a pre-trained Llama over real English, and a student trained from its store.

Needs the folder of real data beside the checkout; skips, and says so, where it is absent.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from potstill.launch.cli import main
from potstill.storage import StoreReader, TokensRow

STEPS = 150
STUDENT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def teacher(shared_data: Path) -> Path:
    """A Llama of 260 thousand parameters, trained on stories of the same kind by somebody else."""
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="module")
def data(shared_data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens stores of real stories, split by document, and the teacher's targets over both."""
    root = tmp_path_factory.mktemp("real")
    text = shared_data / "tinystories" / "valid.jsonl.xz"
    prepare = f"prepare --input {text} --output {root} --tokenizer {teacher} --row-length 128 --rows-per-unit 16"
    assert main([*prepare.split(), "--heldout-fraction", "0.3"]) == 0
    for part in ("train", "heldout"):
        dump = f"dump --tokens {root / part} --teacher {teacher} --output {root / ('targets-' + part)} --k 32 --p 0.95"
        assert main(dump.split()) == 0
    return root


def straight_perplexity(model_folder: Path, tokens: StoreReader) -> float:
    """Perplexity of the labels with transformers alone: each document of each row by itself, in float64 sums."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    loss, count = 0.0, 0
    for number in range(tokens.num_rows):
        row = tokens.row(number)
        assert isinstance(row, TokensRow)
        for document in torch.from_numpy(row.tokens).long().split(row.doc_lens.tolist()):
            if len(document) > 1:
                with torch.no_grad():
                    logits = model(input_ids=document[None]).logits[0, :-1].double()
                loss += float(torch.nn.functional.cross_entropy(logits, document[1:], reduction="sum"))
                count += len(document) - 1
    return math.exp(loss / count)


def test_the_store_holds_the_perplexity_that_transformers_finds(data: Path, teacher: Path) -> None:
    wanted = straight_perplexity(teacher, StoreReader(data / "heldout"))
    store = StoreReader(data / "targets-heldout")
    loss, targets = store.row_stats["mean_loss"].astype(float), store.row_stats["num_targets"].astype(float)
    assert math.exp((loss * targets).sum() / targets.sum()) == pytest.approx(wanted, rel=1e-3)
    assert 2 < wanted < 8  # a teacher that knows its language: 512 entries of uniform guesses would give 512
    words = f"eval --model {teacher} --heldout {data / 'heldout'} --targets {data / 'targets-heldout'}"
    assert main([*words.split(), "--output", str(data / "teacher.json")]) == 0
    figures = json.loads((data / "teacher.json").read_text())
    assert figures["perplexity"] == pytest.approx(wanted, rel=1e-3)
    # Its own targets, cut and on the grid of the store, are still its own.
    assert figures["agreement"] > 0.97
    assert figures["teacher_kl"] < 3e-4


def train_command(data: Path, run: Path, *, num_ranks: int) -> list[str]:
    """A distilled student, every step in the metrics."""
    config = {
        "run": {"output_dir": str(run), "max_steps": STEPS, "seed": 3},
        "model": {"config": STUDENT},
        "data": {
            "tokens": str(data / "train"),
            "targets": {"teacher": str(data / "targets-train")},
            "global_batch_rows": 8,
            "micro_batch_rows": 4,
        },
        "objective": {"alpha": 0.9},
        "curriculum": [{"targets": "teacher"}],
        "optimizer": {"lr": 3e-3},
        "checkpoint": {"every_steps": 10},
        "logging": {"every_steps": 1},
    }
    path = run.with_suffix(".yaml")
    path.write_text(json.dumps(config))
    return [sys.executable, "-m", "potstill.launch", "train", "--config", str(path), "--num-ranks", str(num_ranks)]


def train_lines(run: Path) -> dict[int, dict[str, Any]]:
    """Whole lines of the metrics by step; the last one may be torn by the kill."""
    found = {}
    if (run / "metrics.jsonl").is_file():
        for line in (run / "metrics.jsonl").read_text().split("\n")[:-1]:
            record = json.loads(line)
            if record["kind"] == "train":
                found[record["step"]] = record
    return found


def members(run: Path) -> list[int]:
    """Processes whose command line names the run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if str(run).encode() in words and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


@pytest.mark.slow  # test_train_command and test_resume do the same with made-up rows
@pytest.mark.timeout(400)  # some 30 s of work; the rest is patience with a busy machine
def test_two_ranks_killed_and_one_goes_on_with_the_same_batches(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "student"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "first.log").open("wb") as log:
        first = subprocess.Popen(
            train_command(data, run, num_ranks=2),
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while len(train_lines(run)) < 25 and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert first.poll() is None, (tmp_path / "first.log").read_text()[-3000:]
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        while members(run) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not members(run), "ranks outlived the command that started them"
    finally:
        for pid in [first.pid, *members(run)]:
            subprocess.run(["kill", "-KILL", str(pid)], stderr=subprocess.DEVNULL, check=False)
    before = train_lines(run)
    assert 25 <= len(before) < STEPS
    assert not (run / "done.json").exists()

    second = subprocess.run(
        train_command(data, run, num_ranks=1), env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    assert second.returncode == 0, second.stderr[-3000:]
    assert "resuming at step" in second.stderr
    after = train_lines(run)
    assert sorted(after) == list(range(1, STEPS + 1))
    assert json.loads((run / "done.json").read_text())["step"] == STEPS
    for step, record in before.items():
        assert after[step]["row_digests"] == record["row_digests"], step
        assert after[step]["loss"] == pytest.approx(record["loss"], rel=1e-3), step
    assert len({digest for record in after.values() for digest in record["row_digests"]}) > STEPS // 2
    assert after[STEPS]["loss"] < 0.8 * after[1]["loss"]
