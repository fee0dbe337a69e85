"""Engine vllm over an honest runner gives what engine hf gives, and each lie of a runner ends in words, not in a store.

vLLM itself is in tests/vllm; here its place is taken by transformers, a prompt at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from potstill.common.errors import UserError
from potstill.storage import MismatchError, StoreReader, StoreWriter, read_spec
from potstill.teacher_dump import DumpConfig, dump
from potstill.teacher_dump.batches import apart_batch, packed_batch
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.base import Head
from potstill.teacher_dump.engines.table import ENGINES
from potstill.teacher_dump.engines.vllm_engine.engine import VllmEngine
from potstill.teacher_dump.engines.vllm_engine.prompts import prompts_of
from potstill.teacher_dump.engines.vllm_engine.reference import Reference
from potstill.teacher_dump.engines.vllm_engine.runner import PromptRunner, WrongAnswerError
from potstill.teacher_dump.row_distance import row_distance
from tests.teacher_dump import prompt_runners
from tests.teacher_dump.prompt_runners import HonestRunner, Liar, head_and_reference
from tests.teacher_dump.tiny import ROW_LENGTH, make_tokens, token_rows


@pytest.fixture(autouse=True)
def _runner_in_the_place_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "vllm", prompt_runners.ENTRY)
    monkeypatch.setattr(prompt_runners, "LIES", [])


def config(tokens: Path, output: Path, model: Path, engine: str = "vllm", **changes: Any) -> DumpConfig:
    teacher = {"model": model, "batch_rows": 2, "check_tokenizer": False, "engine": engine}
    return DumpConfig(
        tokens=tokens, output=output, teacher=teacher, **({"selection": {"mode": "top_k", "k": 8}} | changes)
    )


@dataclass(frozen=True)
class Checked:
    """Makes engines of one model over any runner; what transformers says of it is worked out once."""

    honest: HonestRunner
    head: Head
    reference: Reference

    def __call__(self, runner: PromptRunner) -> VllmEngine:
        return VllmEngine(runner, head=self.head, dtype="float32", reference=self.reference)


@pytest.fixture(scope="module")
def checked(llama: Path) -> Checked:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    return Checked(HonestRunner(model, longest=40), *head_and_reference(TeacherConfig(model=llama), 40, torch.float32))


def masks() -> list[np.ndarray | None]:
    """Of the rows of make_tokens: a target in one document of several, none at the end of one, none at all in one."""
    found = [np.zeros(sum(lens), bool) for lens in ((16,), (3, 13), (1, 1, 14), (5, 6, 5), (10, 6), (2, 4, 1))]
    for row, token in ((0, 5), (1, 4), (1, 9), (2, 15), (3, 7), (5, 4)):
        found[row][token] = True
    return [None, *found[1:]]


@pytest.mark.parametrize("masked", [False, True])
def test_the_store_is_that_of_engine_hf(tokens: Path, tmp_path: Path, llama: Path, masked: bool) -> None:
    if masked:
        tokens = make_tokens(tmp_path / "tokens", masks=masks())
    for engine in ("hf", "vllm"):
        dump(config(tokens, tmp_path / engine, llama, engine, temperatures=[2.0]))
    stores = [StoreReader(tmp_path / engine) for engine in ("hf", "vllm")]
    for one, other in zip(*(store.rows(range(6)) for store in stores), strict=True):
        total, count = row_distance(one, other)
        assert total <= 1e-6 * count
        a, b = one.targets, other.targets  # type: ignore[union-attr]
        assert np.array_equal(a.ids, b.ids) and np.array_equal(a.columns["label_rank"], b.columns["label_rank"])
        np.testing.assert_allclose(a.columns["log_tail_at"][2.0], b.columns["log_tail_at"][2.0], atol=1 / 16)
    record = StoreWriter.create(tmp_path / "vllm", read_spec(tmp_path / "vllm")).record(0)
    assert record is not None and record.extra["engine_notes"]["model"] == "LlamaForCausalLM"
    assert (read_spec(tmp_path / "vllm").teacher or {})["engine_pins"] == prompt_runners.PINS


def test_draws_are_those_of_engine_hf(tokens: Path, tmp_path: Path, llama: Path) -> None:
    for engine in ("hf", "vllm"):
        dump(config(tokens, tmp_path / engine, llama, engine, selection={"mode": "sample", "num_draws": 20}))
    stores = [StoreReader(tmp_path / engine) for engine in ("hf", "vllm")]
    for one, other in zip(*(store.rows(range(6)) for store in stores), strict=True):
        assert row_distance(one, other)[0] == 0 < row_distance(one, other)[1]


def test_prompts_are_documents_up_to_their_last_target(tokens: Path, tmp_path: Path) -> None:
    rows = token_rows(tokens)
    for batch in (packed_batch(rows, length=ROW_LENGTH), apart_batch(rows)):
        found = [(prompt.row, prompt.start, len(prompt.ids), prompt.every) for prompt in prompts_of(batch)]
        # Documents of one token have no target, and so no prompt.
        assert found[:4] == [(0, 0, 15, True), (1, 0, 2, True), (1, 3, 12, True), (2, 2, 13, True)]
        assert sum(len(prompt.targets) for prompt in prompts_of(batch)) == len(batch.labels)
    masked = token_rows(make_tokens(tmp_path / "masked", masks=masks()))
    prompts = prompts_of(packed_batch(masked, length=ROW_LENGTH))
    assert [(prompt.row, prompt.start, len(prompt.ids), prompt.targets.tolist()) for prompt in prompts[1:]] == [
        (1, 3, 6, [0, 5]),
        (2, 2, 13, [12]),
        (3, 5, 2, [1]),
        (5, 2, 2, [1]),
    ]


LIES = {
    prompt_runners.zeros: r"hidden states of zeros for a prompt of 8 tokens: 8 of 8 tokens .*vllm#46301",
    prompt_runners.zeros_at_the_end: r"zeros for a prompt of 8 tokens: 1 of 8 tokens",
    prompt_runners.others: r"another prompt than that of prompt 0 of 2 \(first other id at token 0\)",
    prompt_runners.states_of_others: r"two prompts of the same length when they are sent together",
    prompt_runners.short_of_a_token: r"hidden states \[\d+, 32\] for prompt 11 of 12, expected \[8, 32\]",
    prompt_runners.fewer_answers: "vLLM gave 11 answers to 12 prompts",
    prompt_runners.stale_pieces: r"among \d+ tokens, of which it computes 600 in one step, .* in pieces come out wrong",
    prompt_runners.before_the_norm: r"do not give what transformers in float32 gives.*Model-Optimizer#1846",
    prompt_runners.one_for_all: "the same hidden state to tokens 0 and the one after of a prompt of 8",
}


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_lying_runner_is_named_before_the_first_unit(checked: Checked, lie: prompt_runners.Lie) -> None:
    with pytest.raises(UserError, match=LIES[lie]):
        checked(Liar(checked.honest, [lie]))
    checked(Liar(checked.honest, []))


@pytest.mark.parametrize("of", ["before the norm", "the layer before"])
def test_states_of_another_place_in_the_model_are_named(checked: Checked, of: str) -> None:
    with pytest.raises(UserError, match=r"mean total variation 0\.\d+, allowed are 0\.0002 .*layer or from before"):
        checked(HonestRunner(checked.honest.model, longest=40, of=of))


def test_answers_that_are_mixed_up_under_load_end_the_walk(
    tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is well at first; later each call has the states of other requests of the same length."""
    calls: list[int] = []

    def later(prompts: Any, answers: Any) -> Any:
        calls.append(len(prompts))
        return answers if len(calls) < 19 else prompt_runners.states_of_others(prompts, answers)

    rows = [(16,)] * 48
    tokens = make_tokens(tmp_path / "tokens", rows, rows_per_unit=4)
    monkeypatch.setattr(prompt_runners, "LIES", [later])
    with pytest.raises(WrongAnswerError, match=r"two answers to one prompt \(row 3\d, tokens 0 to 14\)"):
        dump(config(tokens, tmp_path / "out", llama))


def test_vllm_continues_what_hf_began_and_the_other_way_round(
    tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump(config(tokens, tmp_path / "out", llama, "hf"), worker=0, num_workers=3)
    dump(config(tokens, tmp_path / "out", llama, "vllm"), worker=1, num_workers=3)
    assert "engine_pins" not in (read_spec(tmp_path / "out").teacher or {})
    dump(config(tokens, tmp_path / "out", llama, "hf"))
    dump(config(tokens, tmp_path / "own", llama, "vllm"), worker=0, num_workers=3)
    # Another version of the engine is held against the units of the first, as another engine is.
    monkeypatch.setattr(prompt_runners, "PINS", {"runner": "transformers", "version": "2"})
    dump(config(tokens, tmp_path / "own", llama, "vllm"), worker=1, num_workers=3)
    dump(config(tokens, tmp_path / "own", llama, "hf"))
    made = {}
    for name in ("out", "own"):
        writer = StoreWriter.create(tmp_path / name, read_spec(tmp_path / name))
        extras = [record.extra for unit in range(3) if (record := writer.record(unit)) is not None]
        made[name] = [(extra.get("engine"), extra.get("engine_pins", {}).get("version")) for extra in extras]
    assert made == {
        "out": [(None, None), ("vllm", "1"), (None, None)],
        "own": [(None, None), ("vllm version=2", "2"), ("hf", None)],
    }
    assert (read_spec(tmp_path / "own").teacher or {})["engine_pins"]["version"] == "1"
    with pytest.raises(MismatchError, match=r"selection\.k is 8 in the store"):
        dump(config(tokens, tmp_path / "own", llama, "vllm", selection={"mode": "top_k", "k": 9}))
