"""Engine zero3 on two gloo ranks gives what engine hf gives, with half of the weights on each rank."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.common.errors import UserError
from potstill.storage import StoreReader
from potstill.teacher_dump import DumpConfig, dump
from tests.dist_harness import run_ranks
from tests.teacher_dump.ranks import dump_as_group
from tests.teacher_dump.tiny import make_tokens


@pytest.mark.xdist_group("ranks")
def test_two_ranks_give_what_one_gives(tmp_path: Path, llama: Path) -> None:
    # Three units for two ranks: one of them has none left and still takes part in the other's passes.
    tokens = make_tokens(tmp_path / "tokens", [(16,), (3, 13), (1, 1, 14), (5, 6, 5), (2, 4, 1)])
    arguments = (str(tokens), str(tmp_path / "group"), str(llama), "float32")
    found: list[dict[str, Any]] = run_ranks(dump_as_group, *arguments, world=2)
    assert [rank["units"] for rank in found] == [2, 1] and all(rank["sealed"] for rank in found)
    assert all(rank["held"] == pytest.approx(0.5, abs=0.05) for rank in found)
    teacher = {"model": llama, "batch_rows": 2, "check_tokenizer": False}
    dump(DumpConfig(tokens=tokens, output=tmp_path / "one", teacher=teacher, selection={"mode": "top_k", "k": 8}))
    group, one = StoreReader(tmp_path / "group"), StoreReader(tmp_path / "one")
    assert group.spec.teacher is not None and group.spec.teacher["engine"] == "zero3"
    for name, values in one.row_stats.items():
        np.testing.assert_allclose(group.row_stats[name], values, rtol=1e-5)
    for number in range(one.num_rows):
        a: Any = group.row(number).targets  # type: ignore[union-attr]
        b: Any = one.row(number).targets  # type: ignore[union-attr]
        assert np.array_equal(a.ids, b.ids) and np.array_equal(a.offsets, b.offsets)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1 / 16 + 1e-6)


def test_zero3_without_a_launcher_says_what_is_missing(
    tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    teacher = {"model": llama, "engine": "zero3", "check_tokenizer": False}
    with pytest.raises(UserError, match="needs a launcher such as torchrun: RANK, WORLD_SIZE"):
        dump(DumpConfig(tokens=tokens, output=tmp_path / "out", teacher=teacher))


@pytest.mark.xdist_group("ranks")
def test_a_group_refuses_a_teacher_with_missing_weights(tmp_path: Path, llama: Path, tokens: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(llama, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    arguments = (str(tokens), str(tmp_path / "out"), str(tmp_path / "model"), "float32")
    with pytest.raises(AssertionError, match=r"1 of its weights are not in the checkpoint \(model\.layers\.1"):
        run_ranks(dump_as_group, *arguments, world=2)
    assert not list((tmp_path / "out" / "units").iterdir())


def test_what_a_group_does_not_do_is_refused(tmp_path: Path, llama: Path, tokens: Path) -> None:
    for setting in ({"compile": True}, {"head": "logits"}):
        with pytest.raises(ValueError, match="engine zero3 knows neither compile nor head=logits"):
            DumpConfig(tokens=tokens, output=tmp_path, teacher={"model": llama, "engine": "zero3", **setting})
