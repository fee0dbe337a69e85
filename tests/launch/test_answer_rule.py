"""An answer has one end and one text, whoever grades it: a rollout, `potstill eval` or a run with held-out answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from potstill.common.token_table import tokenizer_digest
from potstill.storage import StoreReader, TokensRow
from potstill.student_train import evaluate
from potstill.student_train.config.train import EvalConfig
from potstill.student_train.data.stores import open_stores
from potstill.student_train.evaluation.written_answers import answer_writing_of
from potstill.student_train.model.hf_config import hf_config
from potstill.teacher_dump import RolloutConfig, rollout
from tests.student_train import tiny, workers

END, OWN_END, DEFAULT, SPECIAL = 7, 9, 3, (7, 9, *range(24, tiny.VOCAB))  # half of all ids are special tokens
GRADER = {"kind": "rouge_l"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, which has one end; the model's settings name a further one, and a plain word."""
    folder = tmp_path_factory.mktemp("rule") / "model"
    torch.manual_seed(11)
    values = {key: value for key, value in tiny.STUDENT.items() if key != "model_type"}
    ends = {"bos_token_id": 0, "eos_token_id": [OWN_END, DEFAULT]}
    config = AutoConfig.for_model("llama", vocab_size=tiny.VOCAB, initializer_range=0.3, **ends, **values)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    made = Tokenizer(models.WordLevel({f"w{number}": number for number in range(tiny.VOCAB)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(f"w{number}", special=True) for number in SPECIAL])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": f"w{END}"}))
    return folder


def row_of(number: int, loaded: Any, rng: np.random.Generator) -> TokensRow:
    """A prompt, and what the model answers: with a word changed, and every second time with its end behind it."""
    prompt = rng.integers(10, 24, size=3 + number % 4)
    ids = torch.from_numpy(prompt)[None]
    for _ in range(6):
        ids = torch.cat([ids, loaded(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    tokens = ids[0].numpy().astype(np.int32)
    tokens[len(prompt) + 1] = 12
    if number % 2:
        tokens = np.append(tokens, END).astype(np.int32)
    return TokensRow(number, tokens, np.array([len(tokens)], np.int32), np.arange(len(tokens)) >= len(prompt))


@pytest.fixture(scope="module")
def tokens(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded, rng = AutoModelForCausalLM.from_pretrained(model).eval(), np.random.default_rng(2)
    with torch.no_grad():
        rows = [row_of(number, loaded, rng) for number in range(10)]
    digest = tokenizer_digest(AutoTokenizer.from_pretrained(model))
    spec = tiny.spec_of("tokens", num_rows=None, columns=("mask",), tokenizer_digest=digest)
    path = tmp_path_factory.mktemp("rule") / "tokens"
    tiny.write_store(path, spec, rows)
    return path


def test_an_answer_has_the_same_grade_whoever_gives_it(model: Path, tokens: Path, tmp_path: Path) -> None:
    place = {"model": {"model": str(model), "dtype": "float32"}, "output": str(tmp_path / "rollouts")}
    asked = {"tokens": str(tokens), "samples": 0, "grader": GRADER, **place}
    rollout(RolloutConfig.model_validate(asked))
    scores = StoreReader(tmp_path / "rollouts" / "scores")
    grades = np.concatenate([row.more["greedy_score"] for row in scores.scores_rows(range(scores.num_rows))])
    assert 0.1 < grades.mean() < 0.9 and len(set(grades.tolist())) > 2
    written = np.concatenate([row.tokens for row in StoreReader(tmp_path / "rollouts" / "answers").rows(range(10))])
    assert np.isin(written, SPECIAL).any(), "answers hold special tokens"
    answers = {"generate": True, "grader": GRADER}
    tree = {"model": model, "heldout": str(tokens), "num_threads": 1, "answers": answers}
    figures = evaluate(EvalConfig.model_validate(tree)).figures
    assert figures["answers_written"] == len(grades)
    assert figures["answer_grade"] == pytest.approx(grades.mean(), abs=1e-6)


def test_a_run_ends_and_reads_answers_by_the_same_rule(model: Path, tokens: Path) -> None:
    data = {"tokens": str(tokens), "heldout": str(tokens), "global_batch_rows": 2}
    tree = {
        "run": {"output_dir": "x", "max_steps": 1},
        "model": {"path": str(model)},
        "data": data,
        "objective": {"alpha": 0.0},
        "curriculum": [{}],
        "eval": {"answers": {"generate": True, "grader": GRADER}},
    }
    config = workers.config_of(tree)
    found = open_stores(config.model_copy(update={"data": config.data.model_copy(update={"heldout": None})}))
    writing = answer_writing_of(config, found, hf_config(config.model, vocab_size=tiny.VOCAB))
    assert writing is not None and writing.decode is not None
    assert writing.end_ids == {END, OWN_END}, "a plain word ends nothing, nor does any special token"
    assert writing.decode([10, 30, 11]) == "w10 w11"
