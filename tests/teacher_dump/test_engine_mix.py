"""Units of several engines stand in one store where the engines agree, and nowhere else."""

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
from potstill.storage import CommitRecord, MismatchError, Row, StoreReader, StoreWriter, read_spec, verify_store
from potstill.teacher_dump import DumpConfig, ScoreConfig, dump, score
from potstill.teacher_dump.engines.table import ENGINES
from potstill.teacher_dump.row_distance import row_distance
from tests.dist_harness import run_ranks
from tests.teacher_dump import topk_engine
from tests.teacher_dump.ranks import dump_as_group

MIXING = replace(topk_engine.ENTRY, mixes=True)


def config(tokens: Path, output: Path, model: Path, engine: str = "hf", **changes: Any) -> DumpConfig:
    teacher = {"model": model, "batch_rows": 2, "check_tokenizer": False, "engine": engine}
    return DumpConfig(
        tokens=tokens, output=output, teacher=teacher, **({"selection": {"mode": "top_k", "k": 8}} | changes)
    )


def records(store: Path) -> list[CommitRecord]:
    writer = StoreWriter.create(store, read_spec(store))
    found = [writer.record(unit) for unit in range(writer.num_units or 0)]
    return [record for record in found if record is not None]


def digests(store: Path) -> list[str]:
    return [record.sha256 for record in records(store)]


def test_two_engines_that_agree_fill_one_store_and_its_records_say_who(
    tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(ENGINES, "torch_topk", MIXING)
    dump(config(tokens, tmp_path / "calm", llama))
    dump(config(tokens, tmp_path / "both", llama), worker=0, num_workers=2)
    with caplog.at_level("INFO"):
        summary: Any = dump(config(tokens, tmp_path / "both", llama, "torch_topk"))
    assert summary.sealed and "engine torch_topk agrees with the units that" in caplog.text
    # The engines differ in the last bits, the grid does not show it, and run.json is that of the one that began.
    assert digests(tmp_path / "both") == digests(tmp_path / "calm")
    assert StoreReader(tmp_path / "both").digest == StoreReader(tmp_path / "calm").digest
    made_by = [record.extra.get("engine", "hf") for record in records(tmp_path / "both")]
    assert made_by == ["hf", "torch_topk", "hf"]
    parity = records(tmp_path / "both")[1].extra["parity"]
    assert 0 <= parity["total_variation"] <= parity["bound"] == 0.002 and parity["rows"] == 4
    assert verify_store(tmp_path / "both", deep=True).ok


def test_the_first_engine_continues_what_the_second_has_added_to(
    tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENGINES, "torch_topk", MIXING)
    dump(config(tokens, tmp_path / "out", llama), worker=0, num_workers=3)
    dump(config(tokens, tmp_path / "out", llama, "torch_topk"), worker=1, num_workers=3)
    summary: Any = dump(config(tokens, tmp_path / "out", llama))
    assert summary.units == 1 and summary.sealed


def less_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ids, each a tenth of a nat lower and the rest in the tail: figures that are right in themselves."""

    def lower(topk: TopK) -> TopK:
        kept = topk.logprobs - 0.1
        tail = torch.log1p(-kept.double().exp().sum(1)).float()
        return replace(topk, logprobs=kept, log_tail=tail, label_logprob=topk.label_logprob - 0.1)

    monkeypatch.setattr(topk_engine, "SPOIL", [lower])


def another_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights on disk are those of the store, and what the engine holds of one of them is not."""
    load = topk_engine.load

    def changed(teacher: Any, wanted: Any) -> Any:
        engine = load(teacher, wanted)
        with torch.no_grad():
            engine.model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
        return engine

    monkeypatch.setattr(topk_engine, "load", changed)


@pytest.mark.parametrize("lie", [less_sure, another_tensor])
def test_an_engine_that_does_not_agree_adds_nothing(
    tokens: Path,
    tmp_path: Path,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    lie: Callable[[pytest.MonkeyPatch], None],
) -> None:
    monkeypatch.setitem(ENGINES, "torch_topk", MIXING)
    dump(config(tokens, tmp_path / "out", llama), worker=0, num_workers=2)
    before = digests(tmp_path / "out")
    with monkeypatch.context() as lying:
        lie(lying)
        with pytest.raises(UserError, match=r"with engine hf, and torch_topk does not agree .* allowed are 0\.002"):
            dump(config(tokens, tmp_path / "out", llama, "torch_topk"))
    assert digests(tmp_path / "out") == before
    dump(config(tokens, tmp_path / "out", llama, "torch_topk"))
    assert len(digests(tmp_path / "out")) == 3


def test_what_cannot_be_compared_is_refused(
    tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENGINES, "torch_topk", MIXING)
    dump(config(tokens, tmp_path / "own", llama), worker=0, num_workers=2)
    for record in records(tmp_path / "own"):
        (tmp_path / "own" / "units" / f"u{record.unit:07d}.json").unlink()
    with pytest.raises(UserError, match="holds no unit of it that torch_topk could be compared with"):
        dump(config(tokens, tmp_path / "own", llama, "torch_topk"))
    # An engine that does not mix, and another option besides the engine, are refused by name as before.
    dump(config(tokens, tmp_path / "out", llama), worker=0, num_workers=2)
    with pytest.raises(MismatchError, match=r"selection\.k is 8 in the store, 9 is wanted now"):
        dump(config(tokens, tmp_path / "out", llama, "torch_topk", selection={"mode": "top_k", "k": 9}))
    monkeypatch.setitem(ENGINES, "torch_topk", topk_engine.ENTRY)
    with pytest.raises(MismatchError, match=r"teacher\.engine is \"hf\" in the store"):
        dump(config(tokens, tmp_path / "out", llama, "torch_topk"))


def test_scores_of_two_engines(tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "torch_topk", MIXING)
    settings = {"tokens": tokens, "output": tmp_path / "out"}
    model = {"model": llama, "check_tokenizer": False}
    score(ScoreConfig(**settings, model=model), worker=0, num_workers=2)
    with monkeypatch.context() as lying:
        another_tensor(lying)
        with pytest.raises(UserError, match="torch_topk does not agree"):
            score(ScoreConfig(**settings, model={**model, "engine": "torch_topk"}))
    summary = score(ScoreConfig(**settings, model={**model, "engine": "torch_topk"}))
    assert summary.sealed and summary.units == 1


def test_the_distance_of_rows_is_total_variation(tokens: Path, tmp_path: Path, llama: Path) -> None:
    """Held against dense distributions: the ids of each token and its tail, one bucket each."""
    dump(config(tokens, tmp_path / "a", llama))
    dump(config(tokens, tmp_path / "b", llama, selection={"mode": "top_k", "k": 5}))
    a, b = (StoreReader(tmp_path / name).rows(range(6)) for name in ("a", "b"))
    for one, other in zip(a, b, strict=True):
        total, count = row_distance(one, other)
        dense = [dense_of(row) for row in (one, other)]
        assert total == pytest.approx(np.abs(dense[0] - dense[1]).sum() / 2, rel=1e-9) and total > 0
        assert count == int((dense[0].sum(1) > 0).sum())
        assert row_distance(one, one) == (0.0, count)


def dense_of(row: Row) -> np.ndarray:
    """[N, V + 1] float64: what a row of targets says of each id, and of all others in the last column."""
    targets: Any = row.targets  # type: ignore[union-attr]
    dense = np.zeros((targets.num_tokens, 65))
    for token in range(targets.num_tokens):
        span = slice(targets.offsets[token], targets.offsets[token + 1])
        if span.stop > span.start:
            dense[token, targets.ids[span]] = np.exp(targets.logprobs[span].astype(np.float64))
            dense[token, 64] = np.exp(float(targets.log_tail[token]))
    return dense


@pytest.mark.xdist_group("ranks")
def test_a_group_continues_the_store_of_one_process(tokens: Path, tmp_path: Path, llama: Path) -> None:
    calm = config(tokens, tmp_path / "calm", llama)
    dump(calm)
    dump(config(tokens, tmp_path / "out", llama), worker=2, num_workers=3)
    arguments = (str(tokens), str(tmp_path / "out"), str(llama), "float32")
    found: list[dict[str, Any]] = run_ranks(dump_as_group, *arguments, world=2)
    assert sum(rank["units"] for rank in found) == 2 and all(rank["sealed"] for rank in found)
    assert read_spec(tmp_path / "out").fingerprint == read_spec(tmp_path / "calm").fingerprint
    assert digests(tmp_path / "out") == digests(tmp_path / "calm")
    assert [record.extra.get("engine") for record in records(tmp_path / "out")] == ["zero3", "zero3", None]
