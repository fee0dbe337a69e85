"""An engine that is told the best log-probabilities alone: what it cannot do is refused, its store is as any other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.common.errors import UserError
from potstill.storage import StoreReader, TargetsRow, verify_store
from potstill.teacher_dump import DumpConfig, ScoreConfig, dump
from potstill.teacher_dump.batches import packed_batch
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.base import TopKWanted
from potstill.teacher_dump.engines.table import ENGINES
from potstill.teacher_dump.engines.vllm_engine.reference import by_transformers
from potstill.teacher_dump.engines.vllm_engine.runner import WrongAnswerError
from potstill.teacher_dump.engines.vllm_logprobs.runner import Answer, Question
from potstill.teacher_dump.engines.vllm_logprobs.start_checks import check_at_start, probe_pair
from tests.teacher_dump import told_logprobs
from tests.teacher_dump.tiny import VOCAB, save_llama

WANTED = TopKWanted(k=8, vocab_size=VOCAB, temperatures=())
COLUMNS = ("ids", "logprobs", "log_tail", "label_logprob", "label_rank")


def config(tokens: Path, output: Path, model: Path, **changes: Any) -> DumpConfig:
    teacher = {"model": model, "batch_rows": 3, "check_tokenizer": False} | changes.pop("teacher", {})
    settings = {"tokens": tokens, "output": output, "teacher": teacher, "entropy": False}
    return DumpConfig(**(settings | {"selection": {"mode": "top_p_k", "p": 0.9, "k": 20}} | changes))


def targets_of(path: Path) -> list[TargetsRow]:
    reader = StoreReader(path)
    return [row for row in reader.rows(range(reader.num_rows)) if isinstance(row, TargetsRow)]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setitem(ENGINES, "told", told_logprobs.ENTRY)
    return {"engine": "told"}


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 8 output rows beyond the tokenizer, anywhere in the order."""
    return save_llama(tmp_path_factory.mktemp("padded") / "model", vocab_size=VOCAB + 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperatures": [2.0]}, r"say nothing of the tails at temperatures \[2.0\]; leave temperatures out, or use"),
        ({"entropy": True}, "say nothing of the entropy; set entropy=false, or use engine hf"),
        ({"selection": {"mode": "sample"}}, "finished top-k, of which nothing can be drawn; use selection mode top_k"),
        ({"teacher": {"engine": "vllm_logprobs", "compile": True}}, "vllm_logprobs knows neither compile nor head=log"),
        ({"teacher": {"engine": "vllm_logprobs", "head": "hidden"}}, "nor head=hidden: leave them out"),
        ({"teacher": {"engine": "vllm_logprobs", "ensemble": [{"model": "b"}]}}, "an ensemble .* runs on engine hf"),
        (
            {"teacher": {"engine": "vllm_logprobs", "load_options": {"logprobs_mode": "raw_logits"}}},
            "does not take load_options.logprobs_mode: the engine sets it itself",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    wanted = {"teacher": {"engine": "vllm_logprobs"}} | changes
    with pytest.raises(ValueError, match=rf"(engine vllm_logprobs)?.*{words}"):
        config(Path("t"), Path("o"), Path("nowhere"), **wanted)
    assert config(Path("t"), Path("o"), Path("nowhere"), teacher={"engine": "vllm_logprobs"}).entropy is False


def test_scores_hold_entropies_and_are_refused() -> None:
    model = {"model": "nowhere", "engine": "vllm_logprobs"}
    with pytest.raises(ValueError, match="engine vllm_logprobs gives no entropy, which a scores store holds"):
        ScoreConfig(tokens="t", output="o", model=model)


def test_the_store_is_that_of_engine_hf_without_entropies(
    tokens: Path, tmp_path: Path, llama: Path, told: dict[str, str]
) -> None:
    dump(config(tokens, tmp_path / "hf", llama))
    dump(config(tokens, tmp_path / "whole", llama, entropy=True))
    dump(config(tokens, tmp_path / "told", llama, teacher=told))
    spec, whole = StoreReader(tmp_path / "told").spec, StoreReader(tmp_path / "whole")
    assert spec.info["lost"] == ["the entropy over the vocabulary"] and "lost" not in whole.spec.info
    assert set(whole.spec.stats) - set(spec.stats) == {"mean_entropy"}
    rows = [targets_of(tmp_path / name) for name in ("told", "hf", "whole")]
    for own, hf, full in zip(*rows, strict=True):
        assert own.targets.entropy is None and hf.targets.entropy is None and full.targets.entropy is not None
        assert np.array_equal(own.targets.offsets, full.targets.offsets)
        for name in COLUMNS:
            assert np.array_equal(getattr(hf.targets, name), getattr(full.targets, name)), name
        for name in ("ids", "label_rank"):
            assert np.array_equal(getattr(own.targets, name), getattr(full.targets, name)), name
        for name in ("logprobs", "log_tail", "label_logprob"):  # one step of the grid where rounding falls apart
            apart = np.abs(getattr(own.targets, name) - getattr(full.targets, name))
            assert apart.max(initial=0) <= 1 / 16 and (apart > 0).mean() < 0.02, name
        for name in spec.stats:
            assert own.stats[name] == pytest.approx(full.stats[name], rel=1e-5, abs=1e-6)
    assert verify_store(tmp_path / "told", deep=True).ok


def test_mass_beyond_the_tokenizer_is_taken_out_and_told(
    tokens: Path, tmp_path: Path, padded: Path, told: dict[str, str]
) -> None:
    selection = {"mode": "top_k", "k": 56}  # with the spare ones all 72 rows are told
    summary = dump(config(tokens, tmp_path / "told", padded, selection=selection, teacher=told))
    of_hf = dump(config(tokens, tmp_path / "hf", padded, selection=selection))
    assert summary.excluded_mass > 0.01  # type: ignore[union-attr]
    assert summary.excluded_mass == pytest.approx(of_hf.excluded_mass, abs=1e-4)  # type: ignore[union-attr]
    for own, hf in zip(targets_of(tmp_path / "told"), targets_of(tmp_path / "hf"), strict=True):
        assert np.array_equal(own.targets.ids, hf.targets.ids)
        assert np.array_equal(own.targets.label_rank, hf.targets.label_rank)
        assert own.targets.logprobs is not None and hf.targets.logprobs is not None
        for name in ("logprobs", "log_tail", "label_logprob"):
            apart = np.abs(getattr(own.targets, name) - getattr(hf.targets, name))
            assert apart.max(initial=0) <= 1 / 16 and (apart > 0).mean() < 0.03, name


def test_a_setting_of_the_entropy_does_not_mix_with_a_store(tokens: Path, tmp_path: Path, llama: Path) -> None:
    dump(config(tokens, tmp_path / "out", llama))
    with pytest.raises(Exception, match=r"info.lost is \[\"the entropy over the vocabulary\"\] in the store"):
        dump(config(tokens, tmp_path / "out", llama, entropy=True))


def test_a_row_that_is_not_finite_is_refused(
    tokens: Path, tmp_path: Path, llama: Path, told: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(questions: Sequence[Question], answers: list[Answer]) -> list[Answer]:
        """The document of 14 tokens: row 2 of the store."""
        nan = torch.nan
        return [
            replace(one, logprobs=one.logprobs * nan, label_logprob=one.label_logprob * nan)
            if len(one.ids) == 13 and question.ids == third
            else one
            for question, one in zip(questions, answers, strict=True)
        ]

    row: Any = StoreReader(tokens).row(2)
    third = row.tokens[2:15].tolist()
    monkeypatch.setattr(told_logprobs, "SPOIL", [broken])
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"row 2: log-probabilities are not finite at 13 of 13 positions, first at tok"):
        dump(config(tokens, out, llama, teacher=told))
    summary = dump(config(tokens, out, llama, teacher=told, max_rejected_fraction=0.2))
    assert summary.refused_rows == (2,)  # type: ignore[union-attr]
    assert StoreReader(out).row_stats["num_targets"].tolist() == [15, 14, 0, 13, 14, 4]


def changed(**change: Any) -> told_logprobs.Spoil:
    """Each answer with parts of it by functions of the answer."""
    return lambda questions, answers: [
        replace(one, **{name: function(one) for name, function in change.items()}) for one in answers
    ]


def as_told_with_others(questions: Sequence[Question], answers: list[Answer]) -> list[Answer]:
    """Figures of another prompt under the right ids: what a mixed-up server gives."""
    if len(answers) < 2:
        return answers
    sizes = [len(one.ids) for one in answers]
    at = sizes.index(max(sizes))
    other = (at + 1) % len(answers)
    rows = torch.arange(sizes[at]) % sizes[other]
    figures = {name: getattr(answers[other], name)[rows] for name in ("best", "logprobs")}
    return [replace(one, **figures) if number == at else one for number, one in enumerate(answers)]


def cut_short(questions: Sequence[Question], answers: list[Answer]) -> list[Answer]:
    """Behind many others a prompt forgets its first half."""
    if sum(len(one.ids) for one in answers) < 100:
        return answers
    again = answers[-1]
    half = len(again.ids) // 2
    return [*answers[:-1], replace(again, logprobs=again.logprobs.roll(half, 0))]


LIES: dict[str, tuple[told_logprobs.Spoil, str]] = {
    "logits": (changed(logprobs=lambda a: a.logprobs + 1.0), "over all ids sum to .* expected 1"),
    "zeros before the head": (
        changed(
            logprobs=lambda a: torch.full_like(a.logprobs, -np.log(VOCAB)),
            label_logprob=lambda a: torch.full_like(a.label_logprob, -np.log(VOCAB)),
        ),
        "tells the same log-probabilities after every prompt",
    ),
    "a label after what was allowed": (
        changed(label_logprob=lambda a: torch.cat([a.label_logprob[:-1], a.label_logprob[-1:] * 0])),
        "asked alone, vLLM tells other log-probabilities",
    ),
    "ranks from 0": (changed(label_rank=lambda a: a.label_rank + 2), "asked alone, vLLM tells a rank that is not its"),
    "an id twice": (
        changed(best=lambda a: torch.cat([a.best[:, :1], a.best[:, :-1]], 1)),
        "told some twice and others not",
    ),
    "answers of other prompts": (as_told_with_others, "asked (among others|in another order), vLLM tells other log-pr"),
    "states of the second half": (cut_short, "computed in pieces, a prompt gets other log-probabilities"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_server_that_lies_is_found_out_at_the_start(llama: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = told_logprobs.runner_of(llama)
    check_at_start(runner, WANTED, num_best=24, dtype=torch.float32)
    spoil, words = LIES[name]
    monkeypatch.setattr(told_logprobs, "SPOIL", [spoil])
    with pytest.raises(UserError, match=words):
        check_at_start(runner, WANTED, num_best=24, dtype=torch.float32)


def shaken(by: float) -> told_logprobs.Spoil:
    """As experts that are chosen anew: the probabilities of a prompt among others move by a share of themselves."""

    def spoil(questions: Sequence[Question], answers: list[Answer]) -> list[Answer]:
        if len(answers) < 2:
            return answers
        moves = [1 + by * torch.rand(one.logprobs.shape, generator=torch.Generator().manual_seed(0)) for one in answers]
        return [replace(one, logprobs=one.logprobs * move) for one, move in zip(answers, moves, strict=True)]

    return spoil


def test_a_teacher_that_chooses_experts_by_the_batch_is_held_to_its_distributions(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, options = told_logprobs.runner_of(llama), {"num_best": 24, "dtype": torch.float32}
    monkeypatch.setattr(told_logprobs, "SPOIL", [shaken(0.05)])
    check_at_start(runner, WANTED, loose=True, **options)
    with pytest.raises(UserError, match="asked among others, vLLM tells other log-probabilities"):
        check_at_start(runner, WANTED, loose=False, **options)
    for lie in (shaken(1.0), as_told_with_others):
        monkeypatch.setattr(told_logprobs, "SPOIL", [lie])
        with pytest.raises(UserError, match=r"asked (among others|in another order), vLLM tells other log-probabilit"):
            check_at_start(runner, WANTED, loose=True, **options)


def test_a_mix_up_that_begins_later_is_found_by_a_prompt_sent_twice(
    tokens: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = told_logprobs.VllmLogprobsEngine(told_logprobs.runner_of(llama), wanted=WANTED, dtype="float32")
    batch = packed_batch(StoreReader(tokens).tokens_rows(range(3)), length=16)
    monkeypatch.setattr(told_logprobs, "SPOIL", [lambda questions, answers: [*answers[:-1], rolled(answers[-1])]])
    with pytest.raises(
        WrongAnswerError, match=r"two answers to one prompt \(row 0, .*\) that was sent twice among 5: oth"
    ):
        engine.forward(batch)


def rolled(answer: Answer) -> Answer:
    """Each position with the figures of the one before it."""
    return replace(answer, best=answer.best.roll(1, 0), logprobs=answer.logprobs.roll(1, 0))


def test_another_teacher_than_that_of_transformers_is_found_out(llama: Path, tmp_path: Path) -> None:
    runner = told_logprobs.runner_of(llama)
    prompts = [question.ids for question in probe_pair(VOCAB, runner.longest)]
    right, wrong = (
        by_transformers(TeacherConfig(model=model), prompts, dtype="float32", device=torch.device("cpu"))
        for model in (llama, save_llama(tmp_path / "other", seed=1))
    )
    check_at_start(runner, WANTED, num_best=24, dtype=torch.float32, reference=right)
    with pytest.raises(UserError, match="log-probabilities are not those of transformers in float32: mean total vari"):
        check_at_start(runner, WANTED, num_best=24, dtype=torch.float32, reference=wrong)


def test_mass_that_does_not_show_among_the_best_is_refused(padded: Path) -> None:
    """Rows beyond the tokenizer in the middle of the order: nobody tells their mass, so it cannot be taken out."""
    runner = told_logprobs.runner_of(padded)
    check_at_start(runner, WANTED, num_best=VOCAB + 8, dtype=torch.float32)
    with pytest.raises(
        UserError, match=r"8 rows beyond the tokenizer's 64 ids, and they hold a mass of .* does not sho"
    ):
        check_at_start(runner, WANTED, num_best=9, dtype=torch.float32)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda questions, answers: answers[::-1], "vLLM answered another prompt than that of row 0, tokens 0 to 14"),
        (lambda questions, answers: answers[:-1], "vLLM gave 3 answers to 4 prompts"),
        (changed(best=lambda a: a.best[1:], logprobs=lambda a: a.logprobs[1:]), "positions are missing"),
        (
            changed(labels=lambda a: a.labels.roll(1)),
            "vLLM told of id .* at token 0 of row 0, .* positions are shifted",
        ),
        (changed(label_rank=lambda a: a.label_rank.roll(1)), "gives its label a rank that is not its place"),
    ],
)
def test_answers_that_cannot_be_those_of_the_prompts_end_the_work(
    tokens: Path, llama: Path, spoil: told_logprobs.Spoil, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = told_logprobs.VllmLogprobsEngine(told_logprobs.runner_of(llama), wanted=WANTED, dtype="float32")
    batch = packed_batch(StoreReader(tokens).tokens_rows(range(3)), length=16)
    engine.forward(batch)
    monkeypatch.setattr(told_logprobs, "SPOIL", [spoil])
    with pytest.raises((WrongAnswerError, UserError), match=words):
        engine.forward(batch)
