"""score: the columns of a small model, and SALT's median in both readings of its mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.storage import ScoresRow, StoreReader
from potstill.teacher_dump import ScoreConfig, score
from potstill.teacher_dump.row_scores import SCORE_STATS, row_scores
from tests.teacher_dump.tiny import VOCAB
from tests.teacher_dump.truth import dense_truth


def config(tokens: Path, output: Path, model: Path, **changes: Any) -> ScoreConfig:
    settings = {"tokens": tokens, "output": output, "model": {"model": model, "check_tokenizer": False}}
    return ScoreConfig(**(settings | changes))


def test_scores_are_what_transformers_says(tokens: Path, tmp_path: Path, llama: Path) -> None:
    summary = score(config(tokens, tmp_path / "out", llama, salt_rank=5))
    assert summary.sealed and summary.word == "score"
    reader = StoreReader(tmp_path / "out")
    assert reader.spec.stats == SCORE_STATS and reader.spec.info == {"salt_rank": 5}
    for number, truth in enumerate(dense_truth(llama, tokens, vocab_size=VOCAB)):
        row = reader.row(number)
        assert isinstance(row, ScoresRow)
        ranks = [255 if t.label is None else t.order.tolist().index(t.label) for t in truth]
        losses = [0.0 if t.label is None else -t.logprobs[t.label] for t in truth]
        assert row.label_rank.tolist() == ranks
        np.testing.assert_allclose(-row.label_logprob, losses, atol=0.06)
        np.testing.assert_allclose(row.entropy, [0.0 if t.label is None else t.entropy for t in truth], atol=0.06)
        live = [(loss, rank) for loss, rank, t in zip(losses, ranks, truth, strict=True) if t.label is not None]
        dropped = [loss for loss, rank in live if rank < 5]
        stats = {name: float(values[number]) for name, values in reader.row_stats.items()}
        assert stats["mean_loss"] == pytest.approx(np.mean([loss for loss, _ in live]), abs=1e-4)
        assert stats["salt_median_zero"] == pytest.approx(np.median([loss * (r < 5) for loss, r in live]), abs=1e-4)
        assert stats["salt_median_drop"] == pytest.approx(np.median(dropped) if dropped else 0.0, abs=1e-4)
        assert stats["learnable_fraction"] == pytest.approx(len(dropped) / len(live))


def test_the_two_readings_of_salt_differ_when_few_labels_are_ranked() -> None:
    loss = np.array([1.0, 2.0, 8.0, 9.0, 10.0], np.float32)
    rank = np.array([0, 1, 50, 60, 70])
    stats = row_scores(loss, rank, loss, salt_rank=10)
    assert stats["salt_median_zero"] == 0.0 and stats["salt_median_drop"] == 1.5
    assert stats["learnable_fraction"] == pytest.approx(0.4) and stats["mean_loss"] == 6.0
    none = row_scores(loss, rank + 10, loss, salt_rank=10)
    assert none["salt_median_zero"] == none["salt_median_drop"] == 0.0
    empty = row_scores(loss[:0], rank[:0], loss[:0], salt_rank=10)
    assert set(empty) == set(SCORE_STATS) and not any(empty.values())


def test_scores_of_two_workers_are_those_of_one(tokens: Path, tmp_path: Path, llama: Path) -> None:
    score(config(tokens, tmp_path / "one", llama))
    for worker in (1, 0):
        score(config(tokens, tmp_path / "two", llama), worker=worker, num_workers=2)
    assert score(config(tokens, tmp_path / "two", llama)).sealed
    assert StoreReader(tmp_path / "one").digest == StoreReader(tmp_path / "two").digest
