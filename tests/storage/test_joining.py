"""Rows that belong together, as a data set; candidates of a token; labels and positions; a plan over chosen rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from potstill.storage import (
    NO_LABEL,
    EpochPlan,
    Loader,
    MismatchError,
    RowDataset,
    SparseTargets,
    StoreError,
    StoreReader,
    TokensRow,
)
from tests.storage.stores import same_targets, write_targets, write_tokens

NUM_ROWS = 11


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[StoreReader, StoreReader]:
    root = tmp_path_factory.mktemp("joining")
    tokens = write_tokens(root / "tokens", NUM_ROWS, last_tokens=9)
    return tokens, write_targets(root / "targets", tokens)


def test_importing_the_room_does_not_import_torch() -> None:
    code = "import sys, potstill.storage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_data_set_joins_the_stores_by_row(stores: tuple[StoreReader, StoreReader]) -> None:
    tokens, targets = stores
    data = RowDataset(tokens, {"teacher": targets})
    assert len(data) == NUM_ROWS
    some = data.__getitems__([7, 2, 7])
    assert [sample.tokens.row for sample in some] == [7, 2, 7]
    for sample in [data[np.int64(4)], *some, *data]:
        teacher = sample.targets("teacher")
        assert teacher is sample.joined["teacher"] and teacher.row == sample.tokens.row
        assert same_targets(teacher.targets, targets.targets_rows([teacher.row])[0].targets)
    assert [sample.tokens.row for sample in data] == list(range(NUM_ROWS))
    with Loader(
        EpochPlan(NUM_ROWS, global_batch=3, seed=5, joined=["teacher"]), tokens, {"teacher": targets}
    ) as loader:
        batch = next(loader)
        assert batch.targets("teacher") == batch.joined["teacher"]
    with pytest.raises(IndexError, match="row 11 does not exist"):
        data[NUM_ROWS]


def test_a_data_set_refuses_stores_of_other_tokens(stores: tuple[StoreReader, StoreReader], tmp_path: Path) -> None:
    tokens, targets = stores
    other = write_tokens(tmp_path / "other", NUM_ROWS)
    with pytest.raises(MismatchError, match=r"teacher .*input_digest"):
        RowDataset(other, {"teacher": targets})
    with pytest.raises(MismatchError, match="expected tokens"):
        RowDataset(targets, {})
    with pytest.raises(MismatchError, match="is of kind tokens"):
        RowDataset(tokens, {"teacher": tokens})


def test_rows_of_a_kind_are_refused_from_another_store(stores: tuple[StoreReader, StoreReader]) -> None:
    tokens, targets = stores
    assert [row.row for row in tokens.tokens_rows([3, 1])] == [3, 1]
    with pytest.raises(MismatchError, match="is a tokens store, expected a targets store"):
        tokens.targets_rows([0])
    with pytest.raises(MismatchError, match="is a targets store, expected a scores store"):
        targets.scores_rows([0])


def test_labels_and_positions_stay_inside_a_document() -> None:
    row = TokensRow(0, np.array([5, 6, 7, 8, 9, 4], np.int32), np.array([3, 1, 2], np.int32))
    assert row.position_ids().tolist() == [0, 1, 2, 0, 0, 1]
    assert row.labels().tolist() == [6, 7, NO_LABEL, NO_LABEL, 4, NO_LABEL]


def test_candidates_of_log_probabilities_counts_and_weights() -> None:
    logprobs = np.log([0.5, 0.25, 0.6]).astype(np.float32)
    common = {"offsets": [0, 2, 3, 3], "ids": [4, 2, 1], "vocab_size": 8}
    kept = SparseTargets.build(**common, logprobs=logprobs, log_tail=np.log([0.25, 0.4, 1.0]).astype(np.float32))
    found = kept.candidates(0)
    assert found.ids.tolist() == [4, 2]
    np.testing.assert_allclose(found.probs, [0.5, 0.25], rtol=1e-6)
    assert found.tail == pytest.approx(0.25)
    assert kept.candidates(1).ids.tolist() == [1]
    none = kept.candidates(2)
    assert (len(none.ids), len(none.probs), none.tail) == (0, 0, 0.0)
    with pytest.raises(StoreError, match="token 3 does not exist"):
        kept.candidates(3)
    tail = np.zeros(3, np.float32)
    drawn = SparseTargets.build(**common, counts=np.array([6, 4, 10], np.uint8), num_draws=10, log_tail=tail)
    np.testing.assert_allclose(drawn.candidates(0).probs, [0.6, 0.4], rtol=1e-6)
    weights = np.array([0.0, -0.5, 0.25], np.float32)
    weighed = SparseTargets.build(**common, log_weights=weights, num_draws=10, log_tail=tail)
    np.testing.assert_allclose(weighed.candidates(0).probs, np.exp([0.0, -0.5]), rtol=1e-6)


def test_a_plan_over_chosen_rows_takes_each_once_an_epoch(stores: tuple[StoreReader, StoreReader]) -> None:
    tokens, _ = stores
    chosen = np.array([9, 1, 4, 6, 2, 10])
    plan = EpochPlan(NUM_ROWS, global_batch=3, seed=5, rows=chosen)
    for epoch in range(3):
        seen = np.concatenate([plan.rows(2 * epoch), plan.rows(2 * epoch + 1)])
        assert sorted(seen.tolist()) == sorted(chosen.tolist())
    assert plan.rows(0).tolist() != plan.rows(2).tolist()
    assert plan.position(3) == {"epoch": 1, "stage": 0, "rows_consumed": 9}
    same = EpochPlan(NUM_ROWS, global_batch=3, seed=5, rows=sorted(chosen))
    assert same.identity() == plan.identity() and same.rows(1).tolist() == plan.rows(1).tolist()
    with Loader(plan, tokens, {}) as loader:
        assert next(loader).rows.tolist() == plan.rows(0).tolist()
        state = loader.state_dict()
    other = EpochPlan(NUM_ROWS, global_batch=3, seed=5, rows=[9, 1, 4, 6, 2, 3])
    with Loader(other, tokens, {}) as loader, pytest.raises(MismatchError, match=r"plan differs .*rows"):
        loader.load_state_dict(state)
    # A plan over all rows keeps the identity that states saved before had.
    assert "rows" not in EpochPlan(NUM_ROWS, global_batch=3, seed=5).identity()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([1, 2, 2], "named twice"),
        ([1, 11, 3], r"not in \[0, 11\)"),
        ([-1, 2, 3], r"not in \[0, 11\)"),
        (np.ones(11, bool), "np.flatnonzero"),
        ([1, 2], "2 rows are fewer than a global batch of 3"),
    ],
)
def test_chosen_rows_that_cannot_be_are_refused(rows: object, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        EpochPlan(NUM_ROWS, global_batch=3, seed=5, rows=rows)  # type: ignore[arg-type]
