"""An engine may finish its top-k by itself: the store is the same, and what cannot be right is not stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.common.errors import UserError
from potstill.kernels.topk import TopK
from potstill.storage import StoreReader
from potstill.teacher_dump import DumpConfig, ScoreConfig, dump, score
from potstill.teacher_dump.engines.base import TopKWanted
from potstill.teacher_dump.engines.finished import check_top_k
from potstill.teacher_dump.engines.table import ENGINES
from tests.teacher_dump import topk_engine
from tests.teacher_dump.tiny import VOCAB


def config(tokens: Path, output: Path, model: Path, **changes: Any) -> DumpConfig:
    teacher = {"model": model, "batch_rows": 3, "check_tokenizer": False}
    settings = {"tokens": tokens, "output": output, "teacher": teacher, "selection": {"mode": "top_p_k", "k": 20}}
    return DumpConfig(**(settings | changes))


def contents(store: Path) -> list[bytes]:
    """The unit files in order, byte for byte; their names hold a number that differs between two dumps."""
    return [path.read_bytes() for path in sorted((store / "units").glob("u*.arrow"))]


@pytest.mark.parametrize("selection", [{"mode": "top_k", "k": 8}, {"mode": "top_p_k", "p": 0.8, "k": 20}])
def test_the_store_is_byte_for_byte_that_of_engine_hf(
    tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, selection: dict[str, Any]
) -> None:
    options = {"selection": selection, "temperatures": [2.0]}
    dump(config(tokens, tmp_path / "hf", llama, **options))
    monkeypatch.setitem(ENGINES, "hf", topk_engine.ENTRY)  # run.json names the engine, so it takes this one's name
    dump(config(tokens, tmp_path / "own", llama, **options))
    own, hf = StoreReader(tmp_path / "own"), StoreReader(tmp_path / "hf")
    assert own.digest == hf.digest and len(contents(tmp_path / "hf")) == 3
    assert contents(tmp_path / "own") == contents(tmp_path / "hf")
    # The statistics in the index are means of float32 figures before the store's grid, which differ in the last bit.
    for name, values in hf.row_stats.items():
        np.testing.assert_array_max_ulp(own.row_stats[name], values, maxulp=8)


def test_a_new_engine_is_one_entry_from_the_configuration_to_the_store(
    tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = {"model": llama, "check_tokenizer": False, "engine": "torch_topk"}
    with pytest.raises(ValueError, match="Input should be 'hf', 'zero3', 'vllm' or 'vllm_logprobs'"):
        config(tokens, tmp_path / "own", llama, teacher=teacher)
    monkeypatch.setitem(ENGINES, "torch_topk", topk_engine.ENTRY)
    dump(config(tokens, tmp_path / "hf", llama))
    dump(config(tokens, tmp_path / "own", llama, teacher=teacher))
    own, hf = StoreReader(tmp_path / "own"), StoreReader(tmp_path / "hf")
    assert own.spec.teacher is not None and own.spec.teacher["engine"] == "torch_topk"
    for number in range(hf.num_rows):
        a: Any = own.row(number).targets  # type: ignore[union-attr]
        b: Any = hf.row(number).targets  # type: ignore[union-attr]
        for column in ("offsets", "ids", "logprobs", "log_tail", "entropy", "label_logprob", "label_rank"):
            assert np.array_equal(getattr(a, column), getattr(b, column)), column
    score(ScoreConfig(tokens=tokens, output=tmp_path / "scores", model=teacher))
    assert StoreReader(tmp_path / "scores").num_rows == hf.num_rows


def test_what_such_an_engine_cannot_do_is_refused(
    tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENGINES, "torch_topk", topk_engine.ENTRY)
    teacher = {"model": llama, "engine": "torch_topk"}
    with pytest.raises(ValueError, match="engine torch_topk gives a finished top-k, of which nothing can be drawn"):
        config(tokens, tmp_path, llama, teacher=teacher, selection={"mode": "sample"})
    with pytest.raises(ValueError, match="engine torch_topk does not know compile: leave it out, or use engine hf"):
        config(tokens, tmp_path, llama, teacher={**teacher, "compile": True})
    with pytest.raises(ValueError, match="an ensemble has no checkpoints and runs on engine hf"):
        config(tokens, tmp_path, llama, teacher={**teacher, "ensemble": [{"model": llama}]})


def swap_first_two(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values[:, 1:2], values[:, :1], values[:, 2:]], 1)


SPOILED: dict[str, tuple[Callable[[TopK], TopK], str]] = {
    "a column less": (
        lambda t: replace(t, ids=t.ids[:, 1:]),
        r"ids .* torch.int32 \[5, 3\], expected torch.int32 \[5, 4\]",
    ),
    "a position less": (lambda t: replace(t, log_tail=t.log_tail[1:]), r"log_tail .* \[4\], expected .* \[5\]"),
    "another dtype": (lambda t: replace(t, logprobs=t.logprobs.double()), "logprobs .* torch.float64"),
    "other temperatures": (lambda t: replace(t, log_tail_at={}), r"temperatures \[\], expected \[2.0\]"),
    "an id of the padding": (lambda t: replace(t, ids=t.ids.clone().fill_(VOCAB)), "not one of 0 .. 63"),
    "an id below 0": (lambda t: replace(t, ids=t.ids - VOCAB), "not one of 0 .. 63"),
    "an id twice": (lambda t: replace(t, ids=t.ids[:, :1].expand(-1, 4)), "names an id twice"),
    "ascending": (
        lambda t: replace(t, ids=swap_first_two(t.ids), logprobs=swap_first_two(t.logprobs)),
        "not in descending order",
    ),
    "above 0": (lambda t: replace(t, logprobs=t.logprobs + 20), "above 0 or NaN"),
    "NaN": (lambda t: replace(t, logprobs=t.logprobs * torch.nan), "above 0 or NaN"),
    "no tail": (lambda t: replace(t, log_tail=t.log_tail - 20), "do not add up to 1"),
    "mass of the padding": (lambda t: replace(t, logprobs=t.logprobs - 0.01), "do not add up to 1"),
    "a shift by one": (
        lambda t: replace(t, label_logprob=t.label_logprob.roll(1), label_rank=t.label_rank.roll(1)),
        "is each position that of its label",
    ),
}


def made_up() -> tuple[TopK, torch.Tensor, TopKWanted]:
    """A right top-k of 5 positions whose labels are its best ids."""
    wanted = TopKWanted(k=4, vocab_size=VOCAB, temperatures=(2.0,))
    logits = 3 * torch.randn(5, VOCAB + 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = logits[:, :VOCAB].argmax(1)
    return topk_engine.plain_topk(logits, labels, wanted), labels, wanted


@pytest.mark.parametrize("name", SPOILED)
def test_a_top_k_that_cannot_be_right_is_refused(name: str) -> None:
    spoil, message = SPOILED[name]
    topk, labels, wanted = made_up()
    assert check_top_k(topk, labels, wanted, engine="x") is topk
    with pytest.raises(UserError, match=rf"engine x: .*{message}"):
        check_top_k(spoil(topk), labels, wanted, engine="x")


def test_positions_that_will_be_refused_are_left_alone() -> None:
    topk, labels, wanted = made_up()
    broken = replace(topk, lse=topk.lse.clone(), logprobs=topk.logprobs.clone())
    broken.lse[2], broken.logprobs[2] = torch.nan, torch.nan
    assert check_top_k(broken, labels, wanted, engine="x") is broken


def test_nothing_of_a_wrong_top_k_is_stored(
    tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENGINES, "torch_topk", topk_engine.ENTRY)
    monkeypatch.setattr(topk_engine, "SPOIL", [SPOILED["no tail"][0]])
    teacher = {"model": llama, "check_tokenizer": False, "engine": "torch_topk"}
    with pytest.raises(UserError, match=r"engine torch_topk: position 0 of a batch has kept and tail mass"):
        dump(config(tokens, tmp_path / "own", llama, teacher=teacher))
    assert not list((tmp_path / "own" / "units").glob("*.arrow"))
