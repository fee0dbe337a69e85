"""A corpus of another program, from the command that takes it in to a student that trains on it."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest

from potstill.launch.cli import main
from potstill.storage import StoreReader
from potstill.student_train.run.metrics import read_metrics
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.teacher_dump import token_files as made


def test_a_student_trains_on_an_imported_corpus(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = StoreReader(data / "train").spec
    documents = made.some_documents(40, vocab_size=prepared.vocab_size)
    prefix = made.megatron(tmp_path / "corpus_text_document", documents)
    shape = f"--tokenizer {data / 'tokenizer'} --row-length 32 --rows-per-unit 8 --heldout-fraction 0.2"
    assert main(shlex.split(f"import tokens --input {prefix} --output {tmp_path / 'd'} {shape}")) == 0
    assert "of format megatron" in capsys.readouterr().out
    stores = {part: StoreReader(tmp_path / "d" / part) for part in ("train", "heldout")}
    assert sum(store.num_tokens for store in stores.values()) == len(made.joined(documents))
    assert {store.spec.tokenizer_digest for store in stores.values()} == {prepared.tokenizer_digest}
    tree = tiny.config_tree(
        dict.fromkeys(("tokens", "heldout", "heldout_teacher", "teacher", "scores"), tmp_path),
        tmp_path / "run",
        run={"max_steps": 2},
        objective={"alpha": 0.0},
        schedule={"warmup": 1, "decay": 1},
        logging={"every_steps": 1},
    )
    sizes = {"global_batch_rows": 4, "micro_batch_rows": 2}
    places = {"tokens": str(tmp_path / "d" / "train"), "heldout": str(tmp_path / "d" / "heldout")}
    tree |= {"data": places | sizes, "curriculum": [{}]}
    [summary] = run_ranks(workers.train_run, tree, world=1)
    assert summary["steps"] == 2
    losses = [record["ce"] for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert len(losses) == 2 and np.abs(np.array(losses) - np.log(prepared.vocab_size)).max() < 1
