"""Whole answers as held-out figures: counted by hand, over ranks and sources, and the same when they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.common.errors import UserError
from potstill.common.grading import GraderConfig
from potstill.storage import StoreReader, TokensRow
from potstill.student_train import evaluate
from potstill.student_train.config.answers import AnswersConfig
from potstill.student_train.config.train import EvalConfig, ModelConfig
from potstill.student_train.evaluation.heldout import HeldoutEvaluation, SourcesEvaluation, evaluation_line
from potstill.student_train.evaluation.samples import Prompt, TextSampler
from potstill.student_train.evaluation.together import work_together
from potstill.student_train.evaluation.written_answers import Answer, AnswerWriting, answer_writing, answers_of
from potstill.student_train.hf_export.weights import find_source, load_model
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.model.probe import NextLogitsRequest
from potstill.student_train.model.student import StudentModel, build_student
from potstill.student_train.run.metrics import read_metrics
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.student_train.test_samples import tokenizer as tokenizer  # a fixture of these words

CPU = torch.device("cpu")
RIGHT, WRITTEN = slice(-6, -4), slice(-4, None)  # places in the totals of an evaluation


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
    parts, together = parts[:, RIGHT], whole[RIGHT]
    assert parts.sum(0).tolist() == together
    assert parts[:3, 0].tolist() == [4.0, 4.0, 2.0]
    assert parts[3].tolist() == [0.0, 0.0], "five rows in twos: nothing is left for the fourth rank"


def test_rows_without_a_mask_have_no_answers(student: StudentModel, answers, stores) -> None:
    tokens, right = answers
    text = evaluation(StoreReader(stores["heldout"]))
    assert not {"answers", "answer_accuracy"} & set(text.measure(student))
    found = SourcesEvaluation({"text": text, "sums": evaluation(tokens)}, None).measure(student)
    assert (found["answers"], found["answer_accuracy"]) == (10.0, sum(right) / 10)
    assert "answers" not in found["sources"]["text"] and found["sources"]["sums"]["answers"] == 10.0


def words(ids: Any) -> str:
    return " ".join(f"w{number}" for number in ids)


def writing(*, end_ids: Any = (), **options: Any) -> AnswerWriting:
    options = AnswersConfig(generate=True, **options)
    return answer_writing(options, end_ids=set(end_ids), decode=words, vocab_size=tiny.VOCAB)


def test_written_answers_are_exact_where_they_are_right(student: StudentModel, answers) -> None:
    tokens, right = answers
    found = evaluation(tokens, writing=writing()).measure(student)
    assert found["answer_exact"] == found["answer_accuracy"] and found["answers_written"] == 10.0
    assert "answer_grade" not in found and "answer_pass_rate" not in found
    few = evaluation(tokens, writing=writing(max_rows=2)).measure(student)
    assert few["answer_exact"] == sum(right[:4]) / 4 and few["answers"] == 10.0 and few["answers_written"] == 4.0


@torch.no_grad()
def test_no_answer_is_written_beyond_its_row() -> None:
    """A long prompt whose answer is short beside one the other way about, in a student that has no further places."""
    tree = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": tiny.ROW_LENGTH}
    config = ModelConfig(config={**tree, "bos_token_id": 0, "eos_token_id": 0})
    student = build_student(config, hf_config(config, vocab_size=tiny.VOCAB), seed=0).eval()
    prompts, references = [tuple(range(1, tiny.ROW_LENGTH - 1)), (1, 2, 3)], [(5, 7), (5, 6, 8, 7)]
    texts = []

    class Kept(AnswerWriting):
        def compare(self, text: Any, reference: Any) -> tuple[float, ...]:
            texts.append(list(text))
            return super().compare(text, reference)

    graded = Kept(**vars(writing(end_ids={7}, grader=GraderConfig(kind="rouge_l"), max_tokens=9)))
    answers = [Answer(*pair) for pair in zip(prompts, references, strict=True)]
    sizes = {"row_length": tiny.ROW_LENGTH, "batch_rows": 2, "rank": 0, "world_size": 1, "device": CPU}
    assert graded.counts(student, answers, **sizes)[0] == 2.0
    for text, prompt in zip(sorted(texts, key=len), prompts, strict=True):
        ids = list(prompt)
        for _ in range(min(9, tiny.ROW_LENGTH - len(prompt))):
            ids.append(int(student.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert text == ids[len(prompt) :]


def test_a_reference_without_an_end_sets_the_length_of_an_answer() -> None:
    graded = writing(end_ids={7}, grader=GraderConfig(kind="rouge_l"))
    found = {
        reference: graded.limit(Answer((1, 2), reference), most=9, row_length=tiny.ROW_LENGTH)
        for reference in ((5, 6), (5, 6, 7), (5, 7, 6))
    }
    assert list(found.values()) == [2, 9, 9]
    assert graded.limit(Answer(tuple(range(29)), (5, 7)), most=9, row_length=tiny.ROW_LENGTH) == 3
    assert writing(end_ids={7}).limit(Answer((1,), (5, 7)), most=9, row_length=tiny.ROW_LENGTH) == 2


def test_graded_answers_of_all_ranks_add_up(student: StudentModel, answers) -> None:
    """ROUGE-L of the words: a wrong answer shares its first tokens with the reference, and passes from 0.5 on."""
    tokens, right = answers
    graded = writing(grader=GraderConfig(kind="rouge_l"), max_tokens=3)
    found = evaluation(tokens, writing=graded).measure(student)
    assert found["answer_exact"] == sum(right) / 10 < found["answer_pass_rate"] <= 1.0
    assert found["answer_exact"] < found["answer_grade"] < 1.0
    whole = evaluation(tokens, writing=graded).totals(student)[WRITTEN]
    asked = answers_of(tokens.tokens_rows(range(tokens.num_rows)))
    sizes = {"row_length": tiny.ROW_LENGTH, "batch_rows": 2, "world_size": 4, "device": CPU}
    works = [graded.work(asked, rank=rank, **sizes) for rank in range(4)]
    shares = np.array([work_together(work, student, device=CPU, world_size=1) for work in works])
    assert shares.sum(0) == pytest.approx(whole) and shares[:, 0].tolist() == [4.0, 2.0, 2.0, 2.0]


def test_ids_of_the_padding_of_a_head_are_never_written() -> None:
    """The weights say them wherever they are asked; the ids below them are then the ones to choose among."""

    class Padded(torch.nn.Module):
        def forward(self, request: NextLogitsRequest) -> torch.Tensor:
            return torch.arange(tiny.VOCAB + 3.0).expand(len(request.after), -1)

    sizes = {"row_length": tiny.ROW_LENGTH, "batch_rows": 2, "rank": 0, "world_size": 1, "device": CPU}
    last = tiny.VOCAB - 1
    assert writing().counts(Padded(), [Answer((1,), (last, last))], **sizes)[:2] == [1.0, 1.0]
    prompts = (Prompt("given", "", (1, 2)),)
    for temperature in (0.0, 1e-3):
        options = {"end_ids": frozenset(), "num_tokens": 2, "temperature": temperature, "seed": 0}
        sampler = TextSampler(prompts, words, vocab_size=tiny.VOCAB, **options)
        assert [text["text"] for text in sampler.write(Padded(), device=CPU)] == [f"w{last} w{last}"]


@pytest.mark.parametrize(
    ("text", "reference", "exact"),
    [
        ([3, 4, 7], [3, 4, 7], True),
        ([3, 4, 7, 5], [3, 4, 7], True),  # what comes behind the end is nothing
        ([3, 4, 5], [3, 4, 7], False),  # no end where there is one
        ([3, 7, 4], [3, 4, 7], False),  # an end too early
        ([3, 4, 9], [3, 4], True),  # a reference without an end says nothing of what follows
        ([3, 7], [3, 4], False),
    ],
)
def test_answers_are_compared_up_to_their_end(text: list[int], reference: list[int], exact: bool) -> None:
    graded = writing(end_ids={7}, grader=GraderConfig(kind="regex", pattern=r"w\d+"))
    assert graded.compare(text, reference)[:2] == (1.0, float(exact))
    assert writing(end_ids={7}).compare(text, reference)[1] == float(exact)


def test_an_answer_is_the_first_unbroken_run_of_trained_tokens() -> None:
    mask = np.array([0, 0, 1, 1, 0, 1, 1, 1, 1, 0], bool)
    row = TokensRow(0, np.arange(10, dtype=np.int32), np.array([7, 2, 1], np.int32), mask)
    # The second document is trained from its first token on, which nothing predicts; the third has no answer.
    assert answers_of([row]) == [Answer((0, 1), (2, 3)), Answer((7,), (8,))]


def test_a_run_writes_the_figures_on_every_number_of_ranks(
    student: StudentModel, answers, stores, start_weights: Path, tmp_path: Path, tokenizer: Path
) -> None:
    """ZeRO 3 on two ranks, whose forwards are collective, and one process give the figures of the same weights."""
    tokens, _ = answers
    options = {"generate": True, "grader": {"kind": "regex", "pattern": r"w\d+$"}}
    tree = tiny.config_tree(stores, tmp_path / "run", model={"config": None, "path": str(start_weights)}, zero_stage=3)
    tree["run"]["max_steps"] = 1
    tree["data"] |= {"heldout": str(tokens.url), "heldout_targets": None}
    tree["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # every weight is cut
    tree["optimizer"] = {"lr": 1e-12}
    tree["eval"] = {"answers": options, "tokenizer": str(tokenizer)}
    run_ranks(workers.train_run, tree, world=2)
    (line,) = (record for record in read_metrics(tmp_path / "run") if record["kind"] == "eval")
    alone = AnswersConfig.model_validate(options)
    alone_writing = answer_writing(alone, end_ids={7}, decode=words, vocab_size=tiny.VOCAB)
    found = evaluation(tokens, writing=alone_writing).measure(student)
    for name in ("answer_accuracy", "answers", "answer_exact", "answer_grade", "answer_pass_rate", "answers_written"):
        assert line[name] == pytest.approx(found[name]), name
    assert line["answer_exact"] == line["answer_accuracy"]


def test_the_eval_command_writes_answers_and_says_what_grades_need(answers, start_weights: Path) -> None:
    tokens, right = answers
    config: dict[str, Any] = {"model": start_weights, "heldout": str(tokens.url), "num_threads": 1}
    summary = evaluate(EvalConfig.model_validate(config | {"answers": {"generate": True}}))
    assert summary.figures["answer_exact"] == summary.figures["answer_accuracy"] == sum(right) / 10
    assert f"answer_exact   {sum(right) / 10:.5g}" in summary.format()
    with pytest.raises(UserError, match=r"answers\.grader reads texts, and no tokenizer of .* name it with tokenizer"):
        evaluate(EvalConfig.model_validate(config | {"answers": {"generate": True, "grader": {"kind": "rouge_l"}}}))


def test_what_answers_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens is for answers that are generated and graded by another grader"):
        AnswersConfig(generate=True, max_tokens=4)
    data = {"tokens": "x", "global_batch_rows": 1}
    tree = {"run": {"output_dir": "x", "max_steps": 1}, "model": {"config": {}}, "data": data}
    with pytest.raises(UserError, match=r"eval\.answers takes its prompts from held-out rows; name data.heldout"):
        workers.config_of({**tree, "eval": {"answers": {"generate": True}}})
