"""Stores whose ids are ranks by frequency say the same as those that keep ids, to readers who know the feature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from potstill.storage import StoreReader, verify_store
from potstill.storage.rows.id_map import IdMap
from potstill.teacher_dump import DumpConfig, dump
from potstill.teacher_dump.id_frequencies import NUM_PLACES, TOKENS_PER_PLACE, id_frequencies
from tests.teacher_dump.tiny import VOCAB, make_tokens


@pytest.mark.parametrize("mode", ["top_k", "sample"])
def test_ranked_ids_change_bytes_and_nothing_else(tokens: Path, tmp_path: Path, llama: Path, mode: str) -> None:
    selection = {"mode": "top_k", "k": 8} if mode == "top_k" else {"mode": "sample", "num_draws": 20}

    def dumped(name: str, **options: object) -> StoreReader:
        teacher = {"model": llama, "batch_rows": 2, "check_tokenizer": False}
        config = {"tokens": tokens, "output": tmp_path / name, "teacher": teacher, "selection": selection, **options}
        if options:  # two workers, the second of which opens what the first began
            dump(DumpConfig(**config), worker=0, num_workers=2)
            dump(DumpConfig(**config), worker=1, num_workers=2)
        dump(DumpConfig(**config))
        assert verify_store(tmp_path / name, deep=True).ok
        return StoreReader(tmp_path / name)

    plain, ranked = dumped("plain"), dumped("ranked", frequency_ids=True)
    assert "frequency_ids" not in plain.spec.to_json()["required_features"]
    assert "frequency_ids" in ranked.spec.to_json()["required_features"]
    counts = id_frequencies(StoreReader(tokens))
    assert ranked.spec.id_map_sha256 == IdMap.from_frequencies(counts).sha256
    for row in range(plain.num_rows):
        first, second = plain.row(row), ranked.row(row)
        for name, values in first.targets.columns.items():
            if not isinstance(values, dict):
                np.testing.assert_array_equal(values, second.targets.columns[name], err_msg=name)
        assert first.stats == second.stats


def test_a_small_store_is_counted_whole_and_a_large_one_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tokens(tmp_path / "small", [(16,), (9, 7)] * 4)
    small = StoreReader(path)
    every = np.concatenate([small.row(row).tokens for row in range(small.num_rows)])
    np.testing.assert_array_equal(id_frequencies(small), np.bincount(every, minlength=VOCAB))
    monkeypatch.setattr("potstill.teacher_dump.id_frequencies.NUM_PLACES", 3)
    monkeypatch.setattr("potstill.teacher_dump.id_frequencies.TOKENS_PER_PLACE", 2 * small.spec.row_length)
    pieces = np.concatenate([small.row(row).tokens for row in (0, 1, 3, 4, 6, 7)])
    np.testing.assert_array_equal(id_frequencies(small), np.bincount(pieces, minlength=VOCAB))
    assert NUM_PLACES * TOKENS_PER_PLACE >= 500_000
