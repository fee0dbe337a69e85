"""Shapes and places at the edge: large vocabularies, long rows, rows without targets, slow disks."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.storage import StoreReader, StoreWriter, verify_store
from potstill.teacher_dump import DumpConfig, ScoreConfig, dump, score
from potstill.teacher_dump.engines.hf import HfEngine
from tests.teacher_dump.tiny import VOCAB, make_tokens, save_llama
from tests.teacher_dump.truth import dense_truth


def config(tokens: Path, output: Path, model: Path, **changes: Any) -> DumpConfig:
    teacher = {"model": model, "check_tokenizer": False, "batch_rows": 2}
    return DumpConfig(**({"tokens": tokens, "output": output, "teacher": teacher, "selection": {"k": 8}} | changes))


def test_a_vocabulary_of_262144(tmp_path: Path) -> None:
    vocab_size = 262_144
    model = save_llama(tmp_path / "model", vocab_size=vocab_size, hidden_size=16, num_hidden_layers=1)
    tokens = make_tokens(tmp_path / "tokens", [(5,), (1, 2)], vocab_size=vocab_size, row_length=5)
    dump(config(tokens, tmp_path / "out", model, selection={"mode": "top_k", "k": 255}))
    truth = dense_truth(model, tokens, vocab_size=vocab_size)
    reader = StoreReader(tmp_path / "out")
    largest = 0
    for number, tokens_of_row in enumerate(truth):
        row: Any = reader.row(number)
        for place, token in enumerate(tokens_of_row):
            here = slice(*row.targets.offsets[place : place + 2])
            if token.label is not None:
                assert set(row.targets.ids[here].tolist()) == set(token.order[:255].tolist())
                largest = max(largest, int(row.targets.ids[here].max()))
    assert largest > 65_536


def test_a_row_of_32768_tokens(tmp_path: Path) -> None:
    length = 32_768
    model = save_llama(
        tmp_path / "model",
        max_position_embeddings=length,
        hidden_size=8,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_hidden_layers=1,
    )
    tokens = make_tokens(tmp_path / "tokens", [(length,)], row_length=length, rows_per_unit=1)
    dump(config(tokens, tmp_path / "out", model))
    reader = StoreReader(tmp_path / "out")
    assert reader.row_stats["num_targets"].tolist() == [length - 1]
    assert verify_store(tmp_path / "out", deep=True).ok


def test_rows_without_any_target(tmp_path: Path, llama: Path) -> None:
    tokens = make_tokens(tmp_path / "tokens", [(1,) * 16, (1,) * 16, (2, *(1,) * 14), (1,)])
    dump(config(tokens, tmp_path / "t", llama))
    score(ScoreConfig(tokens=tokens, output=tmp_path / "s", model={"model": llama, "check_tokenizer": False}))
    for name in ("t", "s"):
        reader = StoreReader(tmp_path / name)
        assert reader.row_stats["num_targets"].tolist() == [0, 0, 1, 0]
        assert reader.row_stats["mean_loss"][0] == 0 and reader.row_stats["mean_loss"][2] > 0
    row: Any = StoreReader(tmp_path / "t").row(2)
    assert np.flatnonzero(np.diff(row.targets.offsets)).tolist() == [0]


def test_k_beyond_the_vocabulary_keeps_all_of_it(tmp_path: Path, llama: Path, tokens: Path) -> None:
    dump(config(tokens, tmp_path / "out", llama, selection={"mode": "top_k", "k": 200}))
    row: Any = StoreReader(tmp_path / "out").row(0)
    assert set(np.diff(row.targets.offsets).tolist()) == {0, VOCAB}
    assert np.exp(row.targets.log_tail[0]) < 1e-2


def test_a_slow_disk_does_not_hold_up_the_teacher(
    tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a unit is being written the teacher already reads the next one, and threads are bounded."""
    events: list[tuple[str, int]] = []
    next_unit = threading.Event()  # the teacher has read a row of the second unit
    commit, forward = StoreWriter.commit_unit, HfEngine.forward

    def slow_commit(self: StoreWriter, unit: int, *args: Any, **options: Any) -> bool:
        next_unit.wait(60)
        events.append(("committed", unit))
        return commit(self, unit, *args, **options)

    def noted_forward(self: HfEngine, batch: Any) -> Any:
        events.append(("forward", batch.rows[0].row // 2))
        if ("forward", 1) in events:
            next_unit.set()
        return forward(self, batch)

    monkeypatch.setattr(StoreWriter, "commit_unit", slow_commit)
    monkeypatch.setattr(HfEngine, "forward", noted_forward)
    before = threading.active_count()
    dump(config(tokens, tmp_path / "out", llama))
    assert events.index(("forward", 1)) < events.index(("committed", 0))
    assert {unit for word, unit in events if word == "committed"} == {0, 1, 2}
    assert threading.active_count() == before
