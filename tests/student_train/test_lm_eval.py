"""From a run to lm_eval's figures: the template exports, starts the harness, and its accuracy is the model's."""

from __future__ import annotations

import importlib.util
import json
import lzma
import os
import string
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import SHARED_DATA
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.student_train.test_templates import TEMPLATES, run

SCRIPT = TEMPLATES / "export_and_eval.sh"
TASKS = SHARED_DATA / "lm_eval_tasks"
LIMIT = 16


def write_tokenizer(folder: Path) -> None:
    """One token per character, as many as the tiny vocabulary holds."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<unk>", "<eos>", *string.ascii_lowercase, *" ABCDEFGHIJKLMNOP.'"]
    vocabulary = {character: number for number, character in enumerate(characters[: tiny.VOCAB])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)


def accuracy_by_hand(folder: Path, data: Path) -> float:
    """Share of the first pairs whose good sentence is more likely, the sentence starting after <eos>."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def loglikelihood(sentence: str) -> float:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(sentence, add_special_tokens=False)]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        return float(logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum())

    with lzma.open(data, "rt", encoding="utf-8") as file:
        pairs = [json.loads(next(file)) for _ in range(LIMIT)]
    return sum(loglikelihood(pair["good"]) > loglikelihood(pair["bad"]) for pair in pairs) / LIMIT


def test_half_a_command_is_refused(tmp_path: Path) -> None:
    done = run(["bash", str(SCRIPT), str(tmp_path)], TASKS="x")
    assert done.returncode == 2 and "RESULTS_DIR" in done.stdout
    done = run(["bash", str(SCRIPT), "a", "b", "c"], TASKS="")
    assert done.returncode == 2 and "TASKS=" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_lm_eval_on_an_exported_run(tmp_path: Path) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed (extra: eval)")
    if not TASKS.is_dir():
        pytest.skip(f"no task files: {TASKS} does not exist")
    stores = tiny.write_all(tmp_path / "stores")
    tree = tiny.config_tree(stores, tmp_path / "run", run={"max_steps": 4})
    tree["model"]["config"]["max_position_embeddings"] = 512
    run_ranks(workers.train_run, tree, world=1)
    write_tokenizer(tmp_path / "stores" / "tokenizer")  # beside the store, where export looks
    model, results = tmp_path / "model", tmp_path / "results"
    environment = {"TASKS": "demo_blimp", "INCLUDE_PATH": str(TASKS), "WORK_DIR": str(SHARED_DATA)}
    environment |= {"DEVICE": "cpu", "HF_HOME": str(tmp_path / "cache"), "PYTHON": sys.executable}
    package = str(Path(__file__).resolve().parents[2] / "src")
    environment["PYTHONPATH"] = f"{package}:{os.environ.get('PYTHONPATH', '')}"
    command = ["bash", str(SCRIPT), str(tmp_path / "run"), str(model), str(results), "--limit", str(LIMIT)]
    done = run(command, timeout_seconds=300, **environment)
    assert done.returncode == 0, done.stdout
    [path] = results.rglob("results_*.json")
    found = json.loads(path.read_text())
    assert found["n-samples"]["demo_blimp"]["effective"] == LIMIT
    data = SHARED_DATA / "blimp" / "half-a.jsonl.xz"
    assert found["results"]["demo_blimp"]["acc,none"] == pytest.approx(accuracy_by_hand(model, data))
    # A failed export ends the script: the folder is there already.
    again = run(command, **environment)
    assert again.returncode == 1 and "exists" in again.stdout
