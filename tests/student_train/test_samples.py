"""Samples of text: greedy ones are those of transformers, and a run with samples trains to the same bits as without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.common.errors import UserError
from potstill.student_train.data.stores import open_stores
from potstill.student_train.evaluation.samples import TextSampler, sample_line, text_sampler
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.model.probe import NextLogitsRequest
from potstill.student_train.model.student import build_student
from potstill.student_train.run.metrics import read_metrics
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers

SAMPLES = {"every_steps": 4, "samples": 2, "sample_tokens": 6, "sample_prompt_tokens": 5}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose tokens are the words w0, w1, ..., and the special token `end` for id 7."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = {"end" if number == 7 else f"w{number}": number for number in range(tiny.VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken("end", special=True)])
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "end"}')
    return folder


def tree_of(stores: dict[str, Path], run: Path, tokenizer: Path | None, **changes: Any) -> dict[str, Any]:
    """A run whose model has dropout, so that a draw from the global generator would change its losses."""
    options = {**SAMPLES, **changes.pop("eval", {})} | ({} if tokenizer is None else {"tokenizer": str(tokenizer)})
    model = {"config": {**tiny.STUDENT, "attention_dropout": 0.1}}
    return tiny.config_tree(stores, run, **{"model": model, **changes}, eval=options)


def sampler_of(tree: dict[str, Any]) -> TextSampler:
    config = workers.config_of(tree)
    sampler = text_sampler(config, open_stores(config))
    assert sampler is not None
    return sampler


def losses_of(run: Path) -> list[float]:
    return [loss for record in read_metrics(run) if record["kind"] == "train" for loss in record["step_losses"]]


def test_greedy_texts_are_those_of_transformers(stores: dict[str, Path], tmp_path: Path, tokenizer: Path) -> None:
    prompts = {"sample_prompts": ["w3 w9", "w11"], "sample_tokens": 9}
    tree = tree_of(stores, tmp_path / "run", tokenizer, eval=prompts, model={"config": tiny.STUDENT, "init_std": 0.3})
    config = workers.config_of(tree)
    student = build_student(config.model, hf_config(config.model, vocab_size=tiny.VOCAB), seed=5).train()
    sampler = replace(sampler_of(tree), end_ids=frozenset())
    texts = sampler.write(student, device=torch.device("cpu"))
    assert student.training
    assert [text["source"] for text in texts] == ["given", "given", "held-out row 0", "held-out row 5"]
    assert texts[0]["prompt"] == "w3 w9"
    for prompt, text in zip(sampler.prompts, texts, strict=True):
        given = torch.tensor([prompt.ids])
        found = student.hf.eval().generate(given, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert text["text"] == sampler.decode(found[0, len(prompt.ids) :].tolist())
        assert len(text["text"].split()) == 9 and text["ended"] is False
    student.hf.train()
    end = sampler.decode([7])
    assert end == "end" and 7 in sampler_of(tree).end_ids


def test_draws_are_alike_at_each_evaluation_and_leave_the_generator_alone(
    stores: dict[str, Path], tmp_path: Path, tokenizer: Path
) -> None:
    tree = tree_of(stores, tmp_path / "run", tokenizer, eval={"sample_temperature": 1.5})
    config = workers.config_of(tree)
    student = build_student(config.model, hf_config(config.model, vocab_size=tiny.VOCAB), seed=5)
    sampler, before = sampler_of(tree), torch.get_rng_state()
    first, second = (sampler.write(student, device=torch.device("cpu")) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)
    other = replace(sampler, seed=sampler.seed + 1).write(student, device=torch.device("cpu"))
    assert [text["text"] for text in other] != [text["text"] for text in first]


def test_a_text_ends_before_the_end_of_its_document(stores: dict[str, Path], tmp_path: Path, tokenizer: Path) -> None:
    sampler = sampler_of(tree_of(stores, tmp_path / "run", tokenizer))

    class Ends(torch.nn.Module):
        """Says w1 until place 6 of a row, and then the end of the document."""

        def forward(self, request: NextLogitsRequest) -> torch.Tensor:
            chosen = torch.where(request.after < 6, 1, 7)
            return torch.nn.functional.one_hot(chosen, tiny.VOCAB).float()

    for prompt, text in zip(sampler.prompts, sampler.write(Ends(), device=torch.device("cpu")), strict=True):
        assert (text["text"], text["ended"]) == (" ".join(["w1"] * (7 - len(prompt.ids))), True)


@pytest.mark.parametrize(("stage", "world", "temperature"), [(0, 1, 0.9), (3, 2, 0.0)])
def test_samples_do_not_change_training(
    stores: dict[str, Path], tmp_path: Path, tokenizer: Path, stage: int, world: int, temperature: float
) -> None:
    plain, written = tmp_path / "plain", tmp_path / "written"
    options = {"zero_stage": stage, "checkpoint": {"every_steps": 4, "keep_last": 9}}
    run_ranks(workers.train_run, tree_of(stores, plain, None, eval={"samples": 0}, **options), world=world)
    texts = {"sample_prompts": ["w3 w9"], "sample_temperature": temperature}
    tree = tree_of(stores, written, tokenizer, eval=texts, **options)
    console = run_ranks(workers.train_on_a_console, tree, world=world)
    assert losses_of(written) == losses_of(plain)
    samples = [record for record in read_metrics(written) if record["kind"] == "sample"]
    assert [(record["step"], len(record["samples"])) for record in samples] == [(4, 3), (8, 3)]
    assert all(len(text["text"].split()) <= 6 and text["prompt"] for record in samples for text in record["samples"])
    for record in samples:
        assert f"step {record['step']}/8 {sample_line(record['samples'][0])}" in console[0]
    assert all("sample" not in other for other in console[1:])


def test_a_resumed_run_writes_the_same_texts(stores: dict[str, Path], tmp_path: Path, tokenizer: Path) -> None:
    # Without dropout: a checkpoint does not hold the state of torch's generator.
    run, model = tmp_path / "run", {"config": tiny.STUDENT}
    tree = tree_of(stores, run, tokenizer, model=model, checkpoint={"every_steps": 4, "keep_last": 9})
    run_ranks(workers.train_run, tree, world=1)
    before = [record["samples"] for record in read_metrics(run) if record["kind"] == "sample"]
    resumed = tree | {"checkpoint": {"resume": str(run / "checkpoints" / "step_00000004")}}
    run_ranks(workers.train_run, resumed, world=1)
    assert len(before) == 2
    assert [record["samples"] for record in read_metrics(run) if record["kind"] == "sample"] == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval": {}}, "no tokenizer.json was found beside it; name its folder with eval.tokenizer"),
        ({"eval": {"tokenizer": "empty"}}, "holds no tokenizer files"),
        ({"eval": {"tokenizer": "large"}}, "has 60 tokens, the tokens store ids below 48"),
        ({"eval": {"tokenizer": "good", "sample_tokens": 32}}, "must fit in a row of 32 tokens"),
        ({"eval": {"tokenizer": "good", "sample_prompts": ["w1 " * 30]}}, r"eval.sample_prompts.0 is 30 tokens"),
        ({"eval": {"tokenizer": "good", "sample_prompts": [""]}}, r"eval.sample_prompts.0 is 0 tokens"),
        ({"eval": {"tokenizer": "good"}, "data": {"heldout": None, "heldout_targets": None}}, "name that store, or"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_a_model_is_built(
    stores: dict[str, Path], tmp_path: Path, tokenizer: Path, changes: dict[str, Any], message: str
) -> None:
    from tokenizers import Tokenizer, models

    (tmp_path / "empty").mkdir()
    (tmp_path / "large").mkdir()
    Tokenizer(models.WordLevel({f"w{n}": n for n in range(60)}, unk_token="w0")).save(
        str(tmp_path / "large" / "tokenizer.json")
    )
    folders = {"empty": tmp_path / "empty", "large": tmp_path / "large", "good": tokenizer}
    options = dict(changes["eval"])
    folder = folders.get(options.pop("tokenizer", ""))
    others = {key: value for key, value in changes.items() if key != "eval"}
    with pytest.raises(UserError, match=message):
        sampler_of(tree_of(stores, tmp_path / "run", folder, eval=options, **others))


def test_prompts_alone_need_no_held_out_rows(stores: dict[str, Path], tmp_path: Path, tokenizer: Path) -> None:
    options = {"samples": 0, "sample_prompts": ["w1"]}
    data = {"heldout": None, "heldout_targets": None}
    sampler = sampler_of(tree_of(stores, tmp_path / "run", tokenizer, eval=options, data=data))
    assert [prompt.ids for prompt in sampler.prompts] == [(1,)]


def test_the_console_shows_the_end_of_a_prompt_and_the_beginning_of_a_text() -> None:
    line = sample_line({"prompt": "x" * 500 + " end", "text": "begin\n" + "y" * 500})
    assert len(line) < 160 and "\n" not in line and "end' -> 'begin\\n" in line
