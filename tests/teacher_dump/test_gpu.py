"""On a GPU the dump gives what it gives on the CPU, with results copied to pinned memory behind the next batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.storage import StoreReader
from potstill.teacher_dump import DumpConfig, ScoreConfig, dump, score

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def entries(targets: Any, place: int) -> dict[int, float]:
    """The entries of one position: its ids with their log-probabilities or counts of draws."""
    part = slice(*targets.offsets[place : place + 2])
    values = targets.logprobs if targets.counts is None else targets.counts
    return dict(zip(targets.ids[part].tolist(), values[part].astype(float).tolist(), strict=True))


@pytest.mark.parametrize(
    "selection",
    [{"mode": "top_k", "k": 8}, {"mode": "top_p_k", "k": 20, "p": 0.8}, {"mode": "sample", "num_draws": 30}],
)
def test_a_gpu_dump_is_the_cpu_dump(tokens: Path, tmp_path: Path, llama: Path, selection: dict[str, Any]) -> None:
    for device in ("cpu", "cuda"):
        teacher = {"model": llama, "device": device, "batch_rows": 1, "check_tokenizer": False}
        assert dump(DumpConfig(tokens=tokens, output=tmp_path / device, teacher=teacher, selection=selection)).sealed
    cpu, cuda = StoreReader(tmp_path / "cpu"), StoreReader(tmp_path / "cuda")
    for name, values in cpu.row_stats.items():
        tolerance = 0.1 if name == "kept_mass" else 2e-3
        np.testing.assert_allclose(cuda.row_stats[name], values, atol=tolerance, rtol=tolerance)
    same = total = with_entries = 0
    for number in range(cpu.num_rows):
        a: Any = cpu.row(number).targets  # type: ignore[union-attr]
        b: Any = cuda.row(number).targets  # type: ignore[union-attr]
        for place in range(a.num_tokens):
            ours, theirs = entries(a, place), entries(b, place)
            total, with_entries = total + 1, with_entries + bool(ours)
            if ours.keys() == theirs.keys():
                same += 1
                # A value on the border of the store's grid may go to the next point; a draw to the next id.
                step = 1.0 if selection["mode"] == "sample" else 1 / 16 + 1e-5
                assert all(abs(ours[token] - theirs[token]) <= step for token in ours), (number, place)
    assert with_entries > total / 2
    assert same >= 0.97 * total  # other last bits may change an entry at the edge


def test_gpu_scores_are_cpu_scores(tokens: Path, tmp_path: Path, llama: Path) -> None:
    for device in ("cpu", "cuda"):
        model = {"model": llama, "device": device, "check_tokenizer": False}
        score(ScoreConfig(tokens=tokens, output=tmp_path / device, model=model))
    cpu, cuda = (StoreReader(tmp_path / device).row_stats for device in ("cpu", "cuda"))
    for name, values in cpu.items():
        np.testing.assert_allclose(cuda[name], values, atol=5e-3)
