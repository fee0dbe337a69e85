"""Several teachers: a series of checkpoints into sibling stores, an ensemble as the mixture of its members."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.common.errors import UserError
from potstill.storage import StoreReader, StoreWriter
from potstill.teacher_dump import DumpConfig, dump
from potstill.teacher_dump.engines.hf import HfEngine
from tests.teacher_dump.tiny import VOCAB, save_llama
from tests.teacher_dump.truth import dense_truth


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for seed, step in enumerate((10, 20, 30)):
        save_llama(folder / f"step_{step}", seed=seed)
    return folder


def config(tokens: Path, output: Path, run: Path, **teacher: Any) -> DumpConfig:
    settings = {"model": run, "check_tokenizer": False, "batch_rows": 2} | teacher
    return DumpConfig(tokens=tokens, output=output, teacher=settings, selection={"mode": "top_k", "k": 8})


def test_a_series_is_one_dump_per_checkpoint(tokens: Path, tmp_path: Path, run: Path) -> None:
    names = ["step_10", "step_20", str(run / "step_30")]
    summary = dump(config(tokens, tmp_path / "series", run, checkpoints=names))
    assert summary.sealed and summary.num_missing == 0 and summary.format().count("complete and sealed") == 3
    for step in (10, 20, 30):
        dump(config(tokens, tmp_path / f"{step}", run / f"step_{step}"))
        found, alone = StoreReader(tmp_path / "series" / f"step_{step}"), StoreReader(tmp_path / f"{step}")
        assert found.digest == alone.digest
        assert found.spec.teacher is not None and found.spec.teacher["id"] == f"step_{step}"


def test_a_broken_series_goes_on_over_both_axes(
    tokens: Path, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tokens, tmp_path / "series", run, checkpoints=["step_10", "step_20"])
    commit, left = StoreWriter.commit_unit, 4

    def dying(self: StoreWriter, *args: Any, **options: Any) -> bool:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return commit(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "commit_unit", dying)
        with pytest.raises(KeyboardInterrupt):
            dump(settings)
    assert StoreReader(tmp_path / "series" / "step_10").num_rows == 6
    loads = 0
    initialize = HfEngine.__init__

    def counted(self: HfEngine, *args: Any, **options: Any) -> None:
        nonlocal loads
        loads += 1
        initialize(self, *args, **options)

    monkeypatch.setattr(HfEngine, "__init__", counted)
    summary = dump(settings)
    assert summary.sealed and loads == 1 and [member.units for member in summary.members] == [0, 2]


def test_a_checkpoint_that_is_not_there_is_named_before_any_work(tokens: Path, tmp_path: Path, run: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint 'step_99': neither .* is a folder"):
        dump(config(tokens, tmp_path / "series", run, checkpoints=["step_10", "step_99"]))
    with pytest.raises(UserError, match="two checkpoints would be written to"):
        dump(config(tokens, tmp_path / "series", run, checkpoints=["step_10", str(run / "step_10")]))
    assert not (tmp_path / "series").exists()


def test_an_ensemble_is_the_mixture_of_its_members(tokens: Path, tmp_path: Path, run: Path) -> None:
    members = [{"model": run / "step_20", "weight": 2.0}, {"model": run / "step_30", "weight": 1.0}]
    dump(config(tokens, tmp_path / "mix", run / "step_10", weight=1.0, ensemble=members))
    truths = [dense_truth(run / f"step_{step}", tokens, vocab_size=VOCAB) for step in (10, 20, 30)]
    reader = StoreReader(tmp_path / "mix")
    losses = []
    for number, rows in enumerate(zip(*truths, strict=True)):
        row: Any = reader.row(number)
        for place, (one, two, three) in enumerate(zip(*rows, strict=True)):
            if one.label is None:
                continue
            mixture = np.log((np.exp(one.logprobs) + 2 * np.exp(two.logprobs) + np.exp(three.logprobs)) / 4)
            here = slice(*row.targets.offsets[place : place + 2])
            assert set(row.targets.ids[here].tolist()) == set(np.argsort(-mixture)[:8].tolist())
            np.testing.assert_allclose(row.targets.logprobs[here], mixture[row.targets.ids[here]], atol=1 / 32 + 1e-4)
            losses.append(-mixture[one.label])
    stats = reader.row_stats
    total = float((stats["mean_loss"] * stats["num_targets"]).sum())
    assert total == pytest.approx(sum(losses), rel=1e-4)
    assert reader.spec.teacher is not None
    assert [member["weight"] for member in reader.spec.teacher["ensemble"]] == [2.0, 1.0]


def test_an_ensemble_takes_no_checkpoints(tokens: Path, tmp_path: Path, run: Path) -> None:
    with pytest.raises(ValueError, match="an ensemble has no checkpoints"):
        config(tokens, tmp_path, run, ensemble=[{"model": run / "step_10"}], checkpoints=["step_10"])
