"""Engine hf with its layers split over two gloo ranks gives what one process gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.common.errors import UserError
from potstill.storage import StoreReader, read_spec, verify_store
from potstill.teacher_dump import DumpConfig, RolloutConfig, dump
from tests.dist_harness import run_ranks
from tests.teacher_dump.split_ranks import dump_all, settings
from tests.teacher_dump.test_engine_mix import digests, records
from tests.teacher_dump.tiny import save_llama


@pytest.mark.xdist_group("ranks")
def test_two_ranks_to_a_teacher_give_what_one_gives(tmp_path: Path, tokens: Path) -> None:
    # The second head is tied to embeddings of a number of rows that two does not divide.
    models = [
        str(save_llama(tmp_path / "untied")),
        str(save_llama(tmp_path / "tied", vocab_size=65, tie_word_embeddings=True, sharpen=1.0)),
    ]
    series, begun, stopped = (str(tmp_path / name) for name in ("series", "begun", "stopped"))
    for name in ("untied", "tied"):
        dump(settings(str(tokens), str(tmp_path / f"calm_{name}"), str(tmp_path / name), tensor_parallel=1))
    dump(settings(str(tokens), begun, models[0], tensor_parallel=1), worker=2, num_workers=3)
    first, other = run_ranks(dump_all, str(tokens), series, begun, stopped, models, world=2)

    assert first["series"] == [(3, 0, True), (3, 0, True)] and other["series"] == [(0, 0, True), (0, 0, True)]
    assert [*first["held"], *other["held"]] == pytest.approx([0.5] * 4, abs=0.05)
    assert first["distance"]["hidden"] < 5e-6 and first["distance"]["head"] == 0
    for name in ("untied", "tied"):
        _same_rows(StoreReader(tmp_path / "series" / name), StoreReader(tmp_path / f"calm_{name}"))
        assert (read_spec(tmp_path / "series" / name).teacher or {})["tensor_parallel"] == 2

    # Only the first rank's signal counts, and both say the same of it.
    assert first["stopped"] == other["stopped"]
    assert first["stopped"].startswith("StoppedError: dump: stopped by SIGUSR1 after 2 of 3 units")
    assert "did 1 units, 2 rows" in first["continued"] and "rank 1 of 2 held its part" in other["continued"]
    assert verify_store(stopped, deep=True).ok

    # What one process began is continued where the split teacher agrees with it, and the records say who.
    assert "did 2 units, 4 rows" in first["begun"]
    assert digests(tmp_path / "begun") == digests(tmp_path / "calm_untied")
    assert [one.extra.get("engine") for one in records(tmp_path / "begun")] == ["hf tensor_parallel=2"] * 2 + [None]


def _same_rows(split: StoreReader, calm: StoreReader) -> None:
    for name, values in calm.row_stats.items():
        np.testing.assert_allclose(split.row_stats[name], values, rtol=1e-5)
    for number in range(calm.num_rows):
        a: Any = split.row(number).targets  # type: ignore[union-attr]
        b: Any = calm.row(number).targets  # type: ignore[union-attr]
        assert np.array_equal(a.ids, b.ids) and np.array_equal(a.offsets, b.offsets)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1 / 16 + 1e-6)
