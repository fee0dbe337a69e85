"""Draws from a power of the teacher, from settings to store: layouts, the mean, several teachers, rare draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.storage import SparseTargets, StoreReader, verify_store
from potstill.storage.rows.value_grid import WEIGHT_TOP
from potstill.teacher_dump import dump
from potstill.teacher_dump.config import SelectionConfig
from potstill.teacher_dump.selection import HostBatch, cut_rows, selection_spec
from tests.teacher_dump.test_dump import config, targets_of
from tests.teacher_dump.tiny import VOCAB, save_llama, token_rows
from tests.teacher_dump.truth import dense_truth

SELECTION = {"mode": "sample", "num_draws": 20, "seed": 5, "power": 0.8}


def test_a_dump_again_is_the_same_for_every_layout(tokens: Path, tmp_path: Path, llama: Path) -> None:
    dump(config(tokens, tmp_path / "a", llama, selection=SELECTION))
    for worker in (2, 0, 1):
        dump(config(tokens, tmp_path / "b", llama, selection=SELECTION), worker=worker, num_workers=3)
    assert dump(config(tokens, tmp_path / "b", llama, selection=SELECTION)).sealed
    first = StoreReader(tmp_path / "a")
    assert first.digest == StoreReader(tmp_path / "b").digest and verify_store(tmp_path / "a", deep=True).ok
    assert first.spec.selection == {"mode": "sample", "num_draws": 20, "power": 0.8}
    # Other batches give other last bits of the logits; a draw may fall on the other side of a bound, hardly ever.
    dump(config(tokens, tmp_path / "c", llama, selection=SELECTION, teacher={"batch_rows": 1}))
    for a, c in zip(targets_of(tmp_path / "a"), targets_of(tmp_path / "c"), strict=True):
        assert a.targets.log_weights is not None and c.targets.log_weights is not None
        assert np.array_equal(a.targets.ids, c.targets.ids)
        assert np.array_equal(a.targets.log_weights, c.targets.log_weights)
    dump(config(tokens, tmp_path / "d", llama, selection=SELECTION | {"seed": 6}))
    assert StoreReader(tmp_path / "d").digest != first.digest


@pytest.mark.parametrize("power", [0.5, 1.5])
def test_stored_weights_are_unbiased(tokens: Path, tmp_path: Path, llama: Path, power: float) -> None:
    """Summed over all positions and ids, each deviation in its own standard errors (draws and rounding)."""
    truth = dense_truth(llama, tokens, vocab_size=VOCAB)
    log_p = np.array([t.logprobs for row in truth for t in row if t.label is not None], np.float64)
    p, pi = np.exp(log_p), np.exp(power * log_p)
    pi /= pi.sum(1, keepdims=True)
    num_draws, num_seeds, total = 255, 4, np.zeros_like(p)
    for seed in range(num_seeds):
        selection = {"mode": "sample", "num_draws": num_draws, "power": power, "seed": seed}
        dump(config(tokens, tmp_path / str(seed), llama, selection=selection))
        place = 0
        for row, tokens_of_row in zip(targets_of(tmp_path / str(seed)), truth, strict=True):
            assert row.targets.log_weights is not None
            for n, token in enumerate(tokens_of_row):
                here = slice(*row.targets.offsets[n : n + 2])
                assert (here.start == here.stop) == (token.label is None)
                if token.label is not None:
                    total[place, row.targets.ids[here]] += np.exp(row.targets.log_weights[here].astype(np.float64))
                    place += 1
    variance = p**2 * (1 - pi) / (pi * num_draws)
    variance += (variance + p**2) * np.expm1(1 / 16) ** 2 / 4
    deviation = (total / num_seeds - p) / np.sqrt(variance / num_seeds)
    # The draws of a token are negatively correlated, so its sums vary less than these bounds allow.
    assert abs(deviation.mean()) * np.sqrt(deviation.size) < 5
    assert abs(deviation[p > 0.01]).max() < 6
    assert abs((total / num_seeds - p).sum() / np.sqrt(variance.sum() / num_seeds)) < 5


def test_power_one_is_spelled_as_before() -> None:
    """run.json of draws must not change, or stores of earlier versions could not be gone on with."""
    plain = SelectionConfig(mode="sample", num_draws=20)
    assert (
        selection_spec(plain)
        == {"mode": "sample", "num_draws": 20}
        == selection_spec(SelectionConfig(mode="sample", num_draws=20, power=1.0))
    )


def test_series_and_ensembles_draw_alike(tokens: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        save_llama(tmp_path / "run" / name, seed=seed)
    checkpoints: dict[str, Any] = {"checkpoints": ["one", "two"]}
    series = config(tokens, tmp_path / "series", tmp_path / "run", selection=SELECTION, teacher=checkpoints)
    assert dump(series).sealed
    for name in ("one", "two"):
        dump(config(tokens, tmp_path / name, tmp_path / "run" / name, selection=SELECTION))
        assert StoreReader(tmp_path / "series" / name).digest == StoreReader(tmp_path / name).digest
    member = {"ensemble": [{"model": tmp_path / "run" / "two", "weight": 1.0}]}
    dump(config(tokens, tmp_path / "mixture", tmp_path / "run" / "one", selection=SELECTION, teacher=member))
    mixture = targets_of(tmp_path / "mixture")
    assert all(row.targets.log_weights is not None for row in mixture)
    sums = [np.exp(row.targets.log_weights.astype(np.float64)).sum() for row in mixture]
    positions = sum(int((np.diff(row.targets.offsets) > 0).sum()) for row in mixture)
    assert abs(sum(sums) / positions - 1) < 0.1 and verify_store(tmp_path / "mixture", deep=True).ok


def test_a_draw_too_rare_for_the_grid_refuses_its_row(tokens: Path) -> None:
    first, second = token_rows(tokens)[:2]
    marks = [len(row.tokens) - len(row.doc_lens) for row in (first, second)]
    num = sum(marks)
    figures = np.full(num, 1.0, np.float32)
    weights = np.zeros(num, np.float32)
    weights[2] = WEIGHT_TOP + 1 / 16
    weights[marks[0]] = WEIGHT_TOP
    targets = SparseTargets(
        offsets=np.arange(num + 1),
        ids=np.zeros(num, np.int32),
        log_weights=weights,
        num_draws=1,
        log_tail=-figures,
        entropy=figures,
        label_logprob=-figures,
        label_rank=np.zeros(num, np.int32),
    )
    found = HostBatch(targets=targets, excluded_mass=np.zeros(num, np.float32), lse=figures)
    (bad, reason), (good, fine) = cut_rows(found, [first, second])
    assert reason is not None and reason.row == first.row and "log weight 7.0625" in reason.reason
    assert bad.targets.num_entries == 0 and bad.targets.log_weights is not None
    assert fine is None and good.targets.num_entries == marks[1]
