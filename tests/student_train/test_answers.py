"""Whole answers as held-out figures: counted by hand, over ranks and sources, and the same when they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.storage import StoreReader, TokensRow
from potstill.student_train.evaluation.heldout import HeldoutEvaluation, SourcesEvaluation, evaluation_line
from potstill.student_train.hf_export.weights import find_source, load_model
from potstill.student_train.model.student import StudentModel
from tests.student_train import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def student(start_weights: Path) -> StudentModel:
    return StudentModel(load_model(find_source(start_weights), dtype="float32")).eval()


def greedy(student: StudentModel, prompt: list[int], num_tokens: int) -> list[int]:
    """What the model writes, each token from a forward of the document alone."""
    ids = list(prompt)
    for _ in range(num_tokens):
        out = student.hf.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
        ids.append(int((student.hf.lm_head.weight @ out).argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def answers(student: StudentModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[StoreReader, list[bool]]:
    """Rows of three documents whose answers are what the student writes, with one token changed in every second one.

    The last document of each row is masked whole: it has no answer.
    """
    rng, rows, right = np.random.default_rng(3), [], []
    with torch.no_grad():
        for number in range(5):
            tokens: list[int] = []
            mask, lens = [], []
            for document in range(2):
                prompt = rng.integers(tiny.VOCAB, size=3 + number).tolist()
                answer = greedy(student, prompt, 2 + document)
                right.append((number + document) % 2 == 0)
                if not right[-1]:
                    answer[-1] = (answer[-1] + 1) % tiny.VOCAB
                tokens += prompt + answer
                mask += [False] * len(prompt) + [True] * len(answer)
                lens.append(len(prompt) + len(answer))
            tokens += [1, 2, 3]
            row = np.array(tokens, np.int32), np.array([*lens, 3], np.int32), np.array([*mask, *[False] * 3])
            rows.append(TokensRow(number, *row))
    spec = tiny.spec_of("tokens", num_rows=None, columns=("mask",))
    return tiny.write_store(tmp_path_factory.mktemp("answers") / "tokens", spec, rows), right


def evaluation(tokens: StoreReader, *, rank: int = 0, world_size: int = 1, **options: Any) -> HeldoutEvaluation:
    sizes = {"max_rows": None, "batch_rows": 2, **options}
    return HeldoutEvaluation.create(tokens, None, rank=rank, world_size=world_size, device=CPU, **sizes)


def test_an_answer_is_right_where_each_of_its_tokens_is(student: StudentModel, answers) -> None:
    tokens, right = answers
    found = evaluation(tokens).measure(student)
    assert (found["answers"], found["answer_accuracy"]) == (10.0, sum(right) / 10) and 0 < sum(right) < 10
    assert found["accuracy"] > found["answer_accuracy"], "one token of each wrong answer is wrong"
    first = evaluation(tokens, max_rows=1).measure(student)
    assert (first["answers"], first["answer_accuracy"]) == (2.0, sum(right[:2]) / 2)
    assert f"answers right {sum(right) / 10:.3f}" in evaluation_line(found)


def test_ranks_add_up_to_the_whole_and_empty_shares_count_nothing(student: StudentModel, answers) -> None:
    tokens, _ = answers
    whole = evaluation(tokens).totals(student)
    parts = np.array([evaluation(tokens, rank=rank, world_size=4).totals(student) for rank in range(4)])
    assert parts.sum(0)[-2:].tolist() == whole[-2:]
    assert parts[:3, -2].tolist() == [4.0, 4.0, 2.0]
    assert parts[3, -2:].tolist() == [0.0, 0.0], "five rows in twos: nothing is left for the fourth rank"


def test_rows_without_a_mask_have_no_answers(student: StudentModel, answers, stores) -> None:
    tokens, right = answers
    text = evaluation(StoreReader(stores["heldout"]))
    assert not {"answers", "answer_accuracy"} & set(text.measure(student))
    found = SourcesEvaluation({"text": text, "sums": evaluation(tokens)}, None).measure(student)
    assert (found["answers"], found["answer_accuracy"]) == (10.0, sum(right) / 10)
    assert "answers" not in found["sources"]["text"] and found["sources"]["sums"]["answers"] == 10.0
