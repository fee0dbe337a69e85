"""`potstill rollout` from text to text: a run answers, a function grades, and a student trains on what was kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from potstill.launch.cli import main
from potstill.storage import StoreReader, TokensRow
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.model.student import build_student
from potstill.student_train.run.checkpoint import checkpoint_folder, commit_checkpoint
from potstill.student_train.run.run_folder import pinned_values, write_start
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers

STEP, VOCAB, ROW_LENGTH = 6, 280, 32
WORDS = ["the", "still", "runs", "hot", "spirit", "rises", "falls", "clear"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train/ and tokenizer/: prompts of two words, responses of one to three."""
    folder = tmp_path_factory.mktemp("prompts")
    rng = np.random.default_rng(0)
    lines = [
        {"prompt": " ".join(rng.choice(WORDS, 2)), "response": " " + " ".join(rng.choice(WORDS, 1 + number % 3))}
        for number in range(12)
    ]
    (folder / "qa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = f"prepare --input {folder / 'qa.jsonl'} --output {folder / 'd'} --vocab-size {VOCAB} --packing whole"
    options = f"--prompt-field prompt --response-field response --row-length {ROW_LENGTH} --rows-per-unit 2"
    assert main([*words.split(), *options.split(), "--heldout-documents", "1"]) == 0
    return folder / "d"


def tree(data: Path, run: Path) -> dict[str, Any]:
    made = tiny.config_tree(dict.fromkeys(("tokens", "heldout", "heldout_teacher", "teacher", "scores"), data), run)
    made["data"] = {"tokens": str(data / "train"), "global_batch_rows": 2, "micro_batch_rows": 2}
    made |= {"objective": {"alpha": 0.0}, "curriculum": [{}]}
    return made


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with random weights in its checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "student"
    config = workers.config_of(tree(data, folder))
    student_config = hf_config(
        config.model, vocab_size=StoreReader(data / "train").spec.vocab_size, row_length=ROW_LENGTH
    )
    student = build_student(config.model, student_config, seed=config.run.seed)
    checkpoint = checkpoint_folder(folder, STEP)
    checkpoint.mkdir(parents=True)
    write_start(config, student_config, {}, [])
    torch.save({"module": student.state_dict()}, checkpoint / "mp_rank_00_model_states.pt")
    commit_checkpoint(checkpoint, {"loop": {"step": STEP}, "data": {}, "pinned": pinned_values(config)})
    return folder


def shared_letters(answer: str, reference: str) -> float:
    """A grader of one's own."""
    return len(set(answer) & set(reference)) / len(set(answer) | set(reference))


def parts(row: TokensRow, *, trained: bool) -> list[list[int]]:
    """Ids of each document that are trained on, or those that are not."""
    assert row.mask is not None
    ends = np.cumsum(row.doc_lens)
    cut = [slice(end - size, end) for end, size in zip(ends, row.doc_lens, strict=True)]
    return [row.tokens[one][row.mask[one] == trained].tolist() for one in cut]


def test_a_run_answers_and_a_student_trains_on_what_is_kept(
    data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = f"rollout --tokens {data / 'train'} --model {run} --output {output} --samples 2 --grader function"
    grader = ["grader.function=tests.launch.test_rollout_command:shared_letters", "grader.threshold=0.01"]
    assert main([*words.split(), "--set", *grader]) == 0
    told = capsys.readouterr().out
    assert "grade of the greedy answer: mean" in told and "pass rate of 11 prompts" in told
    scores, answers = StoreReader(output / "scores"), StoreReader(output / "answers")
    assert scores.spec.teacher is not None and scores.spec.teacher["id"] == f"student-step-{STEP}"
    about = scores.spec.info["rollout"]
    tokenizer = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json"))
    assert about["stop_ids"] == [tokenizer.token_to_id("<|endoftext|>")] and about["graded_as"] == "text"
    grades = []
    rows = [store.tokens_rows(range(store.num_rows)) for store in (StoreReader(data / "train"), answers)]
    for asked, answered in zip(*rows, strict=True):
        references, mine = parts(asked, trained=True), parts(answered, trained=True)
        for number, reference in enumerate(references):
            assert reference[-1] == about["stop_ids"][0]  # the mark is no word of either text
            greedy, wanted = (tokenizer.decode(ids) for ids in (mine[3 * number], reference))
            grades.append(shared_letters(greedy, wanted))
    found = np.concatenate([row.more["greedy_score"] for row in scores.scores_rows(range(scores.num_rows))])
    np.testing.assert_allclose(found, grades, atol=1e-6)
    assert 0.0 < sum(grades) < len(grades), "a grader that gives all answers one grade shows nothing"
    assert (output / "tokenizer" / "tokenizer.json").is_file()
    # Again: nothing to do, and the export of the checkpoint is the same model.
    assert main([*words.split(), "--set", *grader]) == 0
    assert "did 0 units" in capsys.readouterr().out
    # A student that weighs the problems by their pass rate and orders them as POCL does, then reads the answers.
    changed = tree(data, tmp_path / "run")
    asked = {"tokens": changed["data"].pop("tokens"), "scores": {"rollouts": str(output / "scores")}}
    changed["data"]["sources"] = {"asked": asked, "own": {"tokens": str(output / "tokens")}}
    weights = {"of": "document", "store": "rollouts", "column": "greedy_score", "form": "beta"}
    fused = [{"store": "rollouts", "stat": "mean_greedy_score", "rank_first": "highest"}, {"store": "rollouts"}]
    rows = {"score": {"kind": "rank_fusion", "of": fused}, "keep": "highest", "share": 0.5, "segments": 1}
    stage = {"until": 2, "mix": {"asked": 1}, "weights": weights, "rows": rows}
    changed |= {"curriculum": [stage, {"mix": {"own": 1}}]}
    changed["run"] |= {"max_steps": 4}
    [done] = run_ranks(workers.train_run, changed, world=1)
    assert done["steps"] == 4
