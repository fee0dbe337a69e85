"""Several teachers: a series of checkpoints into sibling stores, an ensemble as the mixture of its members."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.common.errors import UserError
from potstill.storage import StoreReader, StoreWriter
from potstill.teacher_dump import DumpConfig, dump
from potstill.teacher_dump.engines.hf import HfEngine
from tests.teacher_dump.tiny import VOCAB, make_tokens, save_llama
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


def test_a_series_with_a_foreign_checkpoint_is_refused_before_any_work(
    tokens: Path, tmp_path: Path, run: Path, tokenizer_folder: Path
) -> None:
    small = save_llama(tmp_path / "run" / "step_2", vocab_size=VOCAB - 1)
    save_llama(tmp_path / "run" / "step_1")
    with pytest.raises(UserError, match=rf"step_2' has {VOCAB - 1} output rows"):
        dump(config(tokens, tmp_path / "series", tmp_path / "run", checkpoints=["step_1", "step_2"]))
    other = save_llama(tmp_path / "run" / "step_3")
    for file in tokenizer_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    settings = {"checkpoints": ["step_1", "step_3"], "check_tokenizer": True}
    with pytest.raises(UserError, match="step_3' has a tokenizer with digest"):
        dump(config(tokens, tmp_path / "series", tmp_path / "run", **settings))
    assert small.is_dir() and not (tmp_path / "series").exists()


def test_the_weights_of_a_checkpoint_are_gone_before_the_next_is_loaded(
    tokens: Path, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    initialize = HfEngine.__init__

    def watched(self: HfEngine, model: Any, **options: Any) -> None:
        assert not [ref for ref in alive if ref() is not None], "two teachers are held at once"
        alive.append(weakref.ref(model))
        initialize(self, model, **options)

    monkeypatch.setattr(HfEngine, "__init__", watched)
    dump(config(tokens, tmp_path / "series", run, checkpoints=["step_10", "step_20", "step_30"]))
    assert len(alive) == 3


def test_an_ensemble_of_padded_heads_tells_the_mass_it_leaves_out(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three members one ends with the tokenizer, one is padded, one is padded further: nothing is lost unseen."""
    vocab_size, sizes = 50, (50, 64, 96)
    tokens = make_tokens(tmp_path / "tokens", vocab_size=vocab_size)
    folders = [save_llama(tmp_path / f"m{size}", vocab_size=size, seed=size) for size in sizes]
    weights, temperature = (3.0, 1.0, 2.0), 2.0
    kept: list[Any] = []
    commit = StoreWriter.commit_unit

    def spy(self: StoreWriter, unit: int, rows: Any, **options: Any) -> bool:
        kept.extend(rows)
        return commit(self, unit, rows, **options)

    monkeypatch.setattr(StoreWriter, "commit_unit", spy)
    members = [{"model": folder, "weight": weight} for folder, weight in zip(folders[1:], weights[1:], strict=True)]
    settings = config(tokens, tmp_path / "mix", folders[0], weight=weights[0], ensemble=members)
    summary: Any = dump(settings.model_copy(update={"temperatures": [temperature]}))
    truths = [dense_truth(folder, tokens, vocab_size=size) for folder, size in zip(folders, sizes, strict=True)]
    excluded = []
    for row, *rows in zip(sorted(kept, key=lambda row: row.row), *truths, strict=True):
        for place, found in enumerate(zip(*rows, strict=True)):
            if found[0].label is None:
                continue
            parts = [np.pad(np.exp(one.logprobs), (0, 96 - len(one.logprobs))) for one in found]
            mixture = sum(weight * part for weight, part in zip(weights, parts, strict=True)) / sum(weights)
            excluded.append(mixture[vocab_size:].sum())
            inside = mixture[:vocab_size] / mixture[:vocab_size].sum()
            here = slice(*row.targets.offsets[place : place + 2])
            ids = row.targets.ids[here]
            np.testing.assert_allclose(row.targets.logprobs[here], np.log(inside[ids]), atol=3e-5)
            flat = inside ** (1 / temperature)
            tail = np.log(np.delete(flat, ids).sum() / flat.sum())
            np.testing.assert_allclose(row.targets.log_tail_at[temperature][place], tail, atol=1e-3)
    assert np.mean(excluded) > 0.05
    assert summary.excluded_mass == pytest.approx(np.mean(excluded), rel=1e-4)


def test_an_ensemble_of_one_bfloat16_teacher_with_itself_is_that_teacher(
    tokens: Path, tmp_path: Path, run: Path
) -> None:
    teacher = run / "step_10"
    dump(config(tokens, tmp_path / "one", teacher, dtype="bfloat16"))
    dump(config(tokens, tmp_path / "two", teacher, dtype="bfloat16", ensemble=[{"model": teacher, "weight": 3.0}]))
    one, two = (StoreReader(tmp_path / name).row_stats for name in ("one", "two"))
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, rtol=1e-5)
