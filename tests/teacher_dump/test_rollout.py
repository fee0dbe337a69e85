"""rollout: answers that transformers gives as well, grades, pass rates, what is kept, the same bytes in any order."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.common.errors import UserError
from potstill.storage import (
    MismatchError,
    StoreReader,
    StoreWriter,
    TokensRow,
    WriteFailedError,
    format_row,
    seal_store,
    store_stats,
    verify_store,
)
from potstill.teacher_dump import RolloutConfig, ScoreConfig, rollout, score
from tests.teacher_dump.tiny import ROW_LENGTH, make_tokens, save_llama, token_rows

STOP = 3
NAMES = ("answers", "scores", "tokens")
# Tokens of (prompt, answer) of the documents of each row.
ROWS: tuple[tuple[tuple[int, int], ...], ...] = (((3, 3), (4, 6)), ((5, 3),), ((2, 4), (6, 2)), ((3, 5),), ((7, 9),))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sharp enough that some samples are the greedy answer, and not all."""
    return save_llama(tmp_path_factory.mktemp("model") / "student", sharpen=140.0)


def greedy_answers(model: Path, prompts: Sequence[np.ndarray], num_tokens: int) -> list[list[int]]:
    """What transformers itself continues with, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    found = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": STOP, "pad_token_id": 0}
        found.append(loaded.generate(ids, max_new_tokens=num_tokens, **options)[0, len(prompt) :].tolist())
    return found


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Prompts with answers: of a row's first document what the model answers greedily, of the others up to STOP."""
    folder = tmp_path_factory.mktemp("rollout")
    masks = [np.concatenate([np.arange(p + a) >= p for p, a in row]) for row in ROWS]
    lengths = [tuple(p + a for p, a in row) for row in ROWS]
    plain = make_tokens(folder / "plain", lengths, masks=masks)
    rows = token_rows(plain)
    first = greedy_answers(model, [row.tokens[: ROWS[row.row][0][0]] for row in rows], 12)
    for row, answer in zip(rows, first, strict=True):
        ends = np.cumsum(row.doc_lens)
        row.tokens[ends[1:] - 1] = STOP
        prompt, size = ROWS[row.row][0]
        row.tokens[prompt : prompt + size] = (answer + [0] * size)[:size]
    writer = StoreWriter.create(folder / "tokens", StoreReader(plain).spec)
    for unit in range(-(-len(rows) // 2)):
        writer.commit_unit(unit, rows[2 * unit : 2 * unit + 2])
    seal_store(folder / "tokens")
    return folder / "tokens"


def config(tokens: Path, output: Path, model: Path, **changes: Any) -> RolloutConfig:
    settings = {
        "tokens": tokens,
        "output": output,
        "model": {"model": model, "check_tokenizer": False, "batch_rows": 2},
        "samples": 4,
        "grade_ids": True,
        "stop_ids": [STOP],
        "seed": 7,
    }
    return RolloutConfig(**(settings | changes))


def digests(output: Path) -> list[str]:
    return [StoreReader(output / name).digest for name in NAMES]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tokens: Path, model: Path) -> Path:
    """Everything kept, in one go."""
    output = tmp_path_factory.mktemp("whole") / "out"
    summary = rollout(config(tokens, output, model))
    assert summary.sealed and summary.kept is not None
    return output


def documents(row: TokensRow) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of each document."""
    assert row.mask is not None
    ends = np.cumsum(row.doc_lens)
    cut = [slice(end - size, end) for end, size in zip(ends, row.doc_lens, strict=True)]
    return [(row.tokens[one][~row.mask[one]].tolist(), row.tokens[one][row.mask[one]].tolist()) for one in cut]


def questions(tokens: Path) -> dict[tuple[int, int], tuple[list[int], list[int]]]:
    """(prompt, reference) by row and document."""
    return {(row.row, n): found for row in token_rows(tokens) for n, found in enumerate(documents(row))}


def limit(prompt: list[int], reference: list[int]) -> int:
    """An answer ends with the mark, or where a reference without the mark ends; it fits in the row."""
    longest = 9
    return min(longest if STOP in reference else len(reference), ROW_LENGTH - len(prompt))


def test_answers_grades_and_rates(whole: Path, tokens: Path, model: Path) -> None:
    scores, answers = StoreReader(whole / "scores"), StoreReader(whole / "answers")
    asked = questions(tokens)
    prompts = [np.array(prompt) for prompt, _ in asked.values()]
    greedy = dict(zip(asked, greedy_answers(model, prompts, 9), strict=True))
    seen = set()
    for row in scores.scores_rows(range(scores.num_rows)):
        given = documents(answers.tokens_rows([row.row])[0])
        rates, grades = row.more["pass_rate"], row.more["greedy_score"]
        assert len(given) == 5 * len(rates)
        for number, (rate, grade) in enumerate(zip(rates, grades, strict=True)):
            prompt, reference = asked[row.row, number]
            mine = given[5 * number : 5 * number + 5]
            assert all(found == prompt for found, _ in mine)
            assert all(len(answer) <= limit(prompt, reference) for _, answer in mine)
            assert mine[0][1] == greedy[row.row, number][: limit(prompt, reference)]
            assert all(STOP not in answer[:-1] for _, answer in mine)
            passed = [answer == reference for _, answer in mine]
            assert grade == float(passed[0]) and rate == sum(passed[1:]) / 4
            seen.add(float(rate))
        assert row.stats["mean_pass_rate"] == pytest.approx(rates.mean())
        assert row.stats["mean_greedy_score"] == pytest.approx(grades.mean())
    assert len(seen) > 2, "this store must tell some pass rates apart"


def test_the_pass_rate_of_exact_match_is_the_probability_of_the_reference(
    tokens: Path, model: Path, tmp_path: Path
) -> None:
    """Which the losses of the same store give: sampling, ends and limits are those of the distribution."""
    samples = 96
    rollout(config(tokens, tmp_path / "out", model, samples=samples, greedy=False, keep="none"))
    between = 0
    for given, row in zip(
        token_rows(tokens), StoreReader(tmp_path / "out" / "scores").scores_rows(range(5)), strict=True
    ):
        document = np.repeat(np.arange(len(given.doc_lens)), given.doc_lens)[given.has_target()]
        wanted = np.exp(np.bincount(document, row.label_logprob[given.has_target()]))
        error = 4.5 * np.sqrt(wanted * (1 - wanted) / samples) + 1 / samples
        assert (np.abs(row.more["pass_rate"] - wanted) <= error).all(), (row.more["pass_rate"], wanted)
        between += int(((wanted > 0.1) & (wanted < 0.9)).sum())
    assert between >= 2, "this store must ask something whose answer is open"


def test_the_scores_are_those_of_score(whole: Path, tokens: Path, model: Path, tmp_path: Path) -> None:
    """Loss on the reference and grade of the answer are in one store: POCL fuses the two."""
    settings = {"model": model, "check_tokenizer": False, "batch_rows": 2}
    score(ScoreConfig(tokens=str(tokens), output=str(tmp_path / "plain"), model=settings))
    plain, ours = StoreReader(tmp_path / "plain"), StoreReader(whole / "scores")
    for one, other in zip(plain.scores_rows(range(5)), ours.scores_rows(range(5)), strict=True):
        assert np.array_equal(one.label_logprob, other.label_logprob) and np.array_equal(
            one.label_rank, other.label_rank
        )
        assert one.token_digest == other.token_digest
    for name, values in plain.row_stats.items():
        assert np.array_equal(values, ours.row_stats[name]), name
    assert ours.spec.input_digest == StoreReader(tokens).digest
    assert ours.spec.required_features == ["planes", "document_scores"]


def test_the_tokens_hold_the_same_answers_in_rows_of_the_input(whole: Path, tokens: Path) -> None:
    answers, packed = StoreReader(whole / "answers"), StoreReader(whole / "tokens")
    assert (
        packed.spec.row_length == ROW_LENGTH
        and packed.spec.tokenizer_digest == StoreReader(tokens).spec.tokenizer_digest
    )
    by_row, by_document = (
        sorted(found for row in store.tokens_rows(range(store.num_rows)) for found in documents(row))
        for store in (answers, packed)
    )
    assert by_row == by_document and len(by_row) == 5 * 7


def test_the_commands_that_look_at_stores_know_them(whole: Path, tokens: Path) -> None:
    for name in NAMES:
        assert verify_store(whole / name, deep=True).ok
    stats = store_stats(whole / "scores")
    assert stats.histograms["pass_rate"].total == stats.histograms["greedy_score"].total == 7
    assert stats.column_bytes["pass_rate"] > 0 and "greedy_score: mean" in stats.format()
    text = format_row(StoreReader(tokens), StoreReader(whole / "scores"), 0, str, 4, 2)
    assert "mean_pass_rate" in text and "pass_rate of each document: [" in text


def test_several_workers_and_an_end_between_the_two_commits_change_no_byte(
    whole: Path, tokens: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    summary = rollout(config(tokens, output, model), worker=1, num_workers=2)
    assert not summary.sealed and "once more as a single worker" in summary.format()
    commit = StoreWriter.commit_unit

    def full_disk(writer: StoreWriter, *arguments: Any, **options: Any) -> bool:
        if writer.spec.kind == "scores":
            raise WriteFailedError("no space left")
        return commit(writer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "commit_unit", full_disk)
        with pytest.raises(WriteFailedError):
            rollout(config(tokens, output, model), worker=0, num_workers=2)
    # A unit whose scores are there has its answers: the other way round it would be passed over.
    answers, scores = ({path.name for path in (output / name / "units").glob("*.json")} for name in NAMES[:2])
    assert answers >= {"u0000000.json", "u0000001.json"} and scores == {"u0000001.json"}
    assert not (output / "tokens").exists()
    summary = rollout(config(tokens, output, model))
    assert summary.sealed and summary.worker.units == 2 and digests(output) == digests(whole)
    again = rollout(config(tokens, output, model))
    assert again.worker.units == 0 and digests(output) == digests(whole)
    with pytest.raises(MismatchError, match=r"info.rollout.temperature is 1.0 in the store, 0.5 is wanted now"):
        rollout(config(tokens, output, model, temperature=0.5))


@pytest.mark.parametrize("keep", ["passed", "failed", "first"])
def test_what_is_kept(keep: str, whole: Path, tokens: Path, model: Path, tmp_path: Path) -> None:
    rollout(config(tokens, tmp_path / "out", model, keep=keep))
    assert StoreReader(tmp_path / "out" / "scores").digest == StoreReader(whole / "scores").digest
    asked = {tuple(prompt): reference for prompt, reference in questions(tokens).values()}
    store = StoreReader(whole / "tokens")
    every = [found for row in store.tokens_rows(range(store.num_rows)) for found in documents(row)]
    passed = [answer == asked[tuple(prompt)] for prompt, answer in every]
    kept = StoreReader(tmp_path / "out" / "tokens")
    found = sorted(one for row in kept.tokens_rows(range(kept.num_rows)) for one in documents(row))
    if keep == "first":
        assert len(found) == 7
        return
    assert found == sorted(one for one, ok in zip(every, passed, strict=True) if ok == (keep == "passed"))
    assert 0 < len(found) < len(every)


def test_what_no_longer_comes_of_it_does_not_stay(tokens: Path, model: Path, tmp_path: Path) -> None:
    """Answers of an earlier model under the figures of a later one would be trained on for its own."""
    output = tmp_path / "out"
    few = {"samples": 0, "max_new_tokens": 2}
    assert rollout(config(tokens, output, model, **few, keep="none")).kept is None
    with pytest.raises(UserError, match=r"answers lacks 3 units whose figures stand in .*scores.*--keep none.*--force"):
        rollout(config(tokens, output, model, **few))
    assert not (output / "tokens").exists()
    rollout(config(tokens, output, model, **few, force=True))
    assert StoreReader(output / "tokens").num_rows
    never = {"kind": "function", "function": "tests.teacher_dump.test_rollout:never"}
    summary = rollout(config(tokens, output, model, **few, keep="passed", grader=never, force=True))
    assert "no answer was kept (keep: passed)" in summary.format()
    assert StoreReader(output / "answers").num_rows and not (output / "tokens" / "run.json").exists()
    scores = StoreReader(output / "scores")
    assert scores.spec.columns == ("greedy_score",) and not scores.row_stats["mean_greedy_score"].any()
    rollout(config(tokens, output, model, **few, keep="none", force=True))
    assert not (output / "answers" / "run.json").exists()


def never(answer: str, reference: str) -> bool:
    return False


def broken(answer: str, reference: str) -> float:
    raise KeyError("result")


def test_what_cannot_be_asked_is_refused_at_once(tokens: Path, model: Path, tmp_path: Path) -> None:
    def refused(match: str, store: Path = tokens, **changes: Any) -> None:
        with pytest.raises(UserError, match=match):
            rollout(config(store, tmp_path / "out", model, **changes))
        assert not (tmp_path / "out").exists()

    refused("has no masks", store=make_tokens(tmp_path / "plain"))
    starts_trained = [None, np.array([True, False] + [True] * 14)]
    late = make_tokens(tmp_path / "late", [(16,), (16,)], masks=[np.arange(16) > 3, starts_trained[1]])
    refused("row 1, document 0 has no prompt", store=late)
    refused("none of its 1 documents", store=make_tokens(tmp_path / "off", [(9,)], masks=[np.zeros(9, np.bool_)]))
    refused("its tokenizer|the tokenizer of .* is neither beside it", grade_ids=False)
    for force in (False, True):  # a store of prompts that the answers would be put in the place of
        with pytest.raises(UserError, match="tokens is the tokens store itself; name another folder"):
            rollout(config(tokens, tokens.parent, model, force=force))
        with pytest.raises(UserError, match="tokens is a store that rollout did not write"):
            rollout(config(late, tokens.parent, model, force=force))
        assert {path.name for path in tokens.parent.iterdir()} == {"plain", "tokens"}
    refused(r"stop_ids has 64, the ids of .* are below 64", stop_ids=[STOP, 64])
    broken_grader = {"kind": "function", "function": "tests.teacher_dump.test_rollout:broken"}
    refused(r"test_rollout:broken\('.*raised KeyError: 'result'", grader=broken_grader)


def test_settings_that_contradict_are_refused(tokens: Path, model: Path, tmp_path: Path) -> None:
    for changes, match in (
        ({"samples": 0, "greedy": False}, "there are no answers"),
        ({"batch_answers": 0}, "batch_answers"),
        ({"tokenizer": "somewhere"}, "grade_ids reads no tokenizer"),
        ({"stop_ids": [-1]}, "expected ids, 0 or more"),
        ({"grader": {"kind": "regex"}}, "grader regex needs pattern"),
    ):
        with pytest.raises(ValueError, match=match):
            config(tokens, tmp_path / "out", model, **changes)
    with pytest.raises(ValueError, match="use engine hf"):
        RolloutConfig(tokens=str(tokens), output=str(tmp_path), model={"model": model, "engine": "zero3"})


def test_documents_without_an_answer_have_no_figure(model: Path, tmp_path: Path) -> None:
    """They are of the row, so they have a place in its columns."""
    masks = [np.arange(12) % 6 >= 4, np.arange(10) >= 12]
    store = make_tokens(tmp_path / "tokens", [(6, 6), (4, 6)], masks=[masks[0] & (np.arange(12) < 6), masks[1]])
    rollout(config(store, tmp_path / "out", model, samples=1))
    rows = StoreReader(tmp_path / "out" / "scores").scores_rows([0, 1])
    assert [np.isnan(row.more["pass_rate"]).tolist() for row in rows] == [[False, True], [True, True]]
    assert rows[1].stats["mean_pass_rate"] == 0.0 and rows[1].stats["num_targets"] == 0.0


def test_a_refused_row_has_no_figures_and_stops_nothing(model: Path, tmp_path: Path) -> None:
    """A row of which the model says nothing finite: `score` stores it as refused, and so does rollout."""
    import torch
    from safetensors.torch import load_file, save_file

    store = make_tokens(tmp_path / "tokens", [(6, 6)] * 6, masks=[np.arange(12) % 6 >= 4] * 6)
    unknown = int(token_rows(store)[2].tokens[1])  # in the prompt of a document
    bad = [unknown in np.delete(row.tokens, [5, 11]) for row in token_rows(store)]  # but for the last of a document
    assert 0 < sum(bad) < 4
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][unknown] = torch.nan
    weights["lm_head.weight"][unknown] = 0.0  # nor does it come in an answer
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    rules = {"samples": 0, "max_new_tokens": 2}
    with pytest.raises(UserError, match=r"rows are refused, 0 are allowed \(max_rejected_fraction\)"):
        rollout(config(store, tmp_path / "none", broken, **rules))
    summary = rollout(config(store, tmp_path / "out", broken, **rules, max_rejected_fraction=0.6))
    assert [row in summary.worker.refused_rows for row in range(6)] == bad
    rows = StoreReader(tmp_path / "out" / "scores").scores_rows(range(6))
    assert [bool(np.isnan(row.more["greedy_score"]).all()) for row in rows] == bad
    assert [bool(np.isnan(row.more["greedy_score"]).any()) for row in rows] == bad
    kept = StoreReader(tmp_path / "out" / "answers").tokens_rows(range(6))
    assert [not row.mask.any() for row in kept if row.mask is not None] == bad
