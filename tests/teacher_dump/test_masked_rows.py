"""dump and score where rows have masks: targets of an unmasked dump at the positions that are on, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.storage import COLUMNS, ScoresRow, StoreReader, TargetsRow, TokensRow, verify_store
from potstill.teacher_dump import DumpConfig, ScoreConfig, dump, score
from potstill.teacher_dump.batches import TeacherBatch, apart_batch, packed_batch, target_places
from potstill.teacher_dump.engines.hf import HfEngine
from potstill.teacher_dump.engines.table import ENGINES
from tests.teacher_dump import topk_engine
from tests.teacher_dump.tiny import ROW_LENGTH, make_tokens, token_rows

# Rows 2 and 3 are a unit without any target, the last row is shorter, and row 4 has no mask.
LENGTHS = ((16,), (3, 9), (1, 1, 9), (5, 6), (10, 6), (2, 4, 1))


def masks() -> list[np.ndarray | None]:
    rng = np.random.default_rng(5)
    made: list[np.ndarray | None] = [rng.random(sum(lens)) < 0.4 for lens in LENGTHS]
    made[2] = np.zeros(11, np.bool_)
    made[3] = np.arange(11) == 5  # the first token of a document, which nothing predicts
    made[4] = None
    return made


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(with masks, without): the same tokens."""
    folder = tmp_path_factory.mktemp("masked")
    return make_tokens(folder / "masked", LENGTHS, masks=masks()), make_tokens(folder / "plain", LENGTHS)


def rows_of(path: Path, kind: type) -> list[Any]:
    reader = StoreReader(path)
    rows = list(reader.rows(range(reader.num_rows)))
    assert all(isinstance(row, kind) for row in rows)
    return rows


def dump_config(tokens: Path, output: Path, model: Path, **changes: Any) -> DumpConfig:
    teacher = {"model": model, "batch_rows": 2, "check_tokenizer": False} | changes.pop("teacher", {})
    settings = {"tokens": tokens, "output": output, "teacher": teacher, "selection": {"mode": "top_p_k", "k": 20}}
    return DumpConfig(**(settings | changes))


def _pairs(found: Any, values: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """The arrays of a column, one for each temperature where it has one for each."""
    return [(found[t], values[t]) for t in values] if isinstance(values, dict) else [(found, values)]


@pytest.mark.parametrize(
    "changes",
    [
        {"temperatures": [2.0]},
        {"selection": {"mode": "sample", "num_draws": 12, "seed": 3}},
        {"teacher": {"documents": "apart", "batch_rows": 1}},
        {"teacher": {"engine": "torch_topk", "batch_rows": 1}},
    ],
)
def test_targets_are_those_of_the_positions_that_are_on(
    changes: dict[str, Any], stores: tuple[Path, Path], tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENGINES, "torch_topk", topk_engine.ENTRY)
    masked, plain = stores
    for name, tokens in (("masked", masked), ("plain", plain)):
        dump(dump_config(tokens, tmp_path / name, llama, **changes))
    assert verify_store(tmp_path / "masked", deep=True).ok
    num_targets = []
    for source, row, whole in zip(
        token_rows(masked),
        rows_of(tmp_path / "masked", TargetsRow),
        rows_of(tmp_path / "plain", TargetsRow),
        strict=True,
    ):
        on = source.has_target()
        num_targets.append(int(on.sum()))
        assert row.token_digest == whole.token_digest
        assert not np.diff(row.targets.offsets)[~on].any()
        expected = whole.targets.keep_entries(np.repeat(on, np.diff(whole.targets.offsets)))
        for name, values in expected.columns.items():
            found, here = row.targets.columns[name], on if COLUMNS[name].axis == "token" else slice(None)
            for mine, theirs in _pairs(found, values):
                np.testing.assert_array_equal(mine[here], theirs[here], err_msg=name)
        if on.any():
            assert row.targets.label_logprob is not None
            found_loss = -float(row.targets.label_logprob[on].mean())
            assert row.stats["mean_loss"] == pytest.approx(found_loss, abs=0.1)  # the store's grid
    reader = StoreReader(tmp_path / "masked")
    assert reader.row_stats["num_targets"].tolist() == num_targets
    assert num_targets[2:5] == [0, 0, 14] and 0 < num_targets[0] < 15
    assert reader.manifest.num_targets == sum(num_targets)


def test_scores_are_those_of_the_positions_that_are_on(stores: tuple[Path, Path], tmp_path: Path, llama: Path) -> None:
    model = {"model": llama, "check_tokenizer": False, "batch_rows": 1}
    for name, tokens in zip(("masked", "plain"), stores, strict=True):
        score(ScoreConfig(tokens=tokens, output=tmp_path / name, model=model))
    for source, row, whole in zip(
        token_rows(stores[0]),
        rows_of(tmp_path / "masked", ScoresRow),
        rows_of(tmp_path / "plain", ScoresRow),
        strict=True,
    ):
        on = source.has_target()
        for mine, theirs in (
            (row.label_logprob, whole.label_logprob),
            (row.entropy, whole.entropy),
            (row.label_rank, whole.label_rank),
        ):
            np.testing.assert_array_equal(mine[on], theirs[on])
        assert not row.label_logprob[~on].any() and not row.entropy[~on].any() and (row.label_rank[~on] == 255).all()
        assert row.stats["num_targets"] == on.sum()
        if on.any():
            assert row.stats["accuracy"] == pytest.approx(float((whole.label_rank[on] == 0).mean()))


def test_padding_and_untrained_documents_cost_the_teacher_nothing(stores: tuple[Path, Path]) -> None:
    rows = token_rows(stores[0])
    packed = packed_batch(rows[1:4], length=ROW_LENGTH)
    assert packed.input_ids.shape == (3, 16)
    shorter = packed_batch([rows[5]], length=ROW_LENGTH, fixed=False)
    assert shorter.input_ids.shape == (1, 8)
    assert packed_batch(rows, length=ROW_LENGTH, fixed=False).input_ids.shape == (6, 16)
    apart = apart_batch(rows[:2])
    with_target = sum(
        bool(part.any()) for row in rows[:2] for part in np.split(row.has_target(), np.cumsum(row.doc_lens))
    )
    assert apart.input_ids.shape[0] == with_target
    for batch in (packed, shorter, apart):
        lines = batch.input_ids.reshape(-1)
        assert len(batch.positions) == sum(int(row.has_target().sum()) for row in batch.rows)
        assert np.array_equal(lines[batch.positions + 1], batch.labels)
    assert apart_batch(rows[2:4]).input_ids.shape[0] == 1 and not len(apart_batch(rows[2:4]).labels)
    numbers, places = target_places(rows)
    wanted = [(row.row, int(place)) for row in rows for place in np.flatnonzero(row.has_target())]
    assert list(zip(numbers.tolist(), places.tolist(), strict=True)) == wanted


def test_a_batch_is_as_long_as_its_longest_row(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the targets are the same as in lines of full length."""
    tokens = make_tokens(tmp_path / "tokens", [(5, 3), (7,), (16,), (9,)])
    forward: Callable[[HfEngine, TeacherBatch], Any] = HfEngine.forward
    shapes = []

    def spy(self: HfEngine, batch: TeacherBatch) -> Any:
        shapes.append(batch.input_ids.shape)
        return forward(self, batch)

    monkeypatch.setattr(HfEngine, "forward", spy)
    dump(dump_config(tokens, tmp_path / "short", llama))
    assert shapes == [(2, 8), (2, 16)]
    monkeypatch.setattr(
        "potstill.teacher_dump.work.packed_batch", lambda rows, *, length, fixed: packed_batch(rows, length=length)
    )
    shapes.clear()
    dump(dump_config(tokens, tmp_path / "full", llama))
    assert shapes == [(2, 16), (2, 16)]
    for one, other in zip(rows_of(tmp_path / "short", TargetsRow), rows_of(tmp_path / "full", TargetsRow), strict=True):
        assert np.array_equal(one.targets.ids, other.targets.ids)
        assert np.array_equal(one.targets.logprobs, other.targets.logprobs)


def test_masks_reach_the_reader(stores: tuple[Path, Path]) -> None:
    for row, mask in zip(token_rows(stores[0]), masks(), strict=True):
        assert isinstance(row, TokensRow)
        assert (row.mask is None) == (mask is None) and np.array_equal(row.mask, mask)  # type: ignore[arg-type]
