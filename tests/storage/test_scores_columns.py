"""Numbers per document in a scores store: kept to the bit, refused where they do not fit, unknown to older readers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.storage import (
    SCORES_COLUMNS,
    CorruptError,
    EpochPlan,
    Loader,
    RunSpec,
    ScoresRow,
    StoreError,
    StoreReader,
    StoreWriter,
    VersionError,
    seal_store,
    verify_store,
)
from tests.storage.stores import make_rolled_row, make_scores_row, targets_spec, write_masked, write_rolled

NUM_ROWS = 7
NAMES = ("pass_rate", "greedy_score")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    return write_masked(tmp_path_factory.mktemp("tokens") / "t", NUM_ROWS)


@pytest.fixture(scope="module")
def rolled(tokens: StoreReader, tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    return write_rolled(tmp_path_factory.mktemp("rolled") / "s", tokens)


def test_rows_come_back_with_their_numbers(tokens: StoreReader, rolled: StoreReader) -> None:
    for given, row in zip(tokens.tokens_rows(range(NUM_ROWS)), rolled.scores_rows(range(NUM_ROWS)), strict=True):
        wanted = make_rolled_row(given, rolled.spec)
        assert row.more.keys() == set(NAMES) and row.token_digest == wanted.token_digest
        for name in NAMES:
            np.testing.assert_array_equal(row.more[name], wanted.more[name])
            assert len(row.more[name]) == len(given.doc_lens)
    assert rolled.spec.required_features == ["planes", "document_scores"] and rolled.spec.stores("pass_rate")
    assert RunSpec.from_json(rolled.spec.to_json()) == rolled.spec
    assert verify_store(rolled.url, deep=True).ok


def test_a_store_without_them_keeps_its_bytes(tokens: StoreReader, tmp_path: Path) -> None:
    plain = write_rolled(tmp_path / "plain", tokens, columns=())
    assert plain.spec.required_features == ["planes"] and "columns" not in plain.spec.to_json()
    one = write_rolled(tmp_path / "one", tokens, columns=("greedy_score",))
    assert one.scores_rows([3])[0].more.keys() == {"greedy_score"} and plain.scores_rows([3])[0].more == {}
    np.testing.assert_array_equal(one.scores_rows([3])[0].entropy, plain.scores_rows([3])[0].entropy)


def test_the_loader_hands_them_out(tokens: StoreReader, rolled: StoreReader) -> None:
    with Loader(EpochPlan(NUM_ROWS, global_batch=4, seed=0, joined=["r"]), tokens, {"r": rolled}) as loader:
        batch = next(loader)
        for given, row in zip(batch.tokens, batch.joined["r"], strict=True):
            assert isinstance(row, ScoresRow)
            np.testing.assert_array_equal(row.more["pass_rate"], make_rolled_row(given, rolled.spec).more["pass_rate"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, r"columns per document are \[\], the run names \['greedy_score', 'pass_rate'\]"),
        ({"pass_rate": [1.5, 0.0]}, r"pass_rate: document 0 has 1.5, expected a number in \[0, 1\], or NaN"),
        ({"greedy_score": [0.0, -np.inf]}, r"greedy_score: document 1 has -inf"),
        (
            {"pass_rate": [0.5]},
            r"columns per document are of different numbers of documents: \{'pass_rate': 1, 'greedy_score': 2\}",
        ),
        ({"pass_rate": []}, r"pass_rate: found float32 of shape \(0,\), expected float32 \[documents\]"),
        ({"other": [0.5, 0.5]}, r"columns per document are \['greedy_score', 'other', 'pass_rate'\]"),
    ],
)
def test_what_does_not_fit_is_refused(tokens: StoreReader, tmp_path: Path, more: Any, message: str) -> None:
    spec = targets_spec(1, tokens.digest, kind="scores", selection=None, teacher=None, stats=(), columns=NAMES)
    base = {name: np.array([0.5, 0.25], np.float32) for name in NAMES} if more else {}
    row = make_scores_row(tokens.tokens_rows([0])[0], spec)
    row = replace(row, more=base | {name: np.array(values, np.float32) for name, values in more.items()})
    with pytest.raises(StoreError, match=f"row 0: {message}"):
        StoreWriter.create(tmp_path / "s", spec).commit_unit(0, [row])


def test_a_reader_that_does_not_know_them_refuses_the_store(
    rolled: StoreReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = rolled.spec.to_json()
    with pytest.raises(VersionError, match="pass_rate and the feature document_scores come together"):
        RunSpec.from_json(value | {"required_features": ["planes"]})
    with pytest.raises(VersionError, match="pass_rate and the feature document_scores come together"):
        RunSpec.from_json({name: field for name, field in value.items() if name != "columns"})
    with pytest.raises(StoreError, match=r"columns \('mask',\) must be distinct and among \['pass_rate'"):
        replace(rolled.spec, columns=("mask",))
    for name in reversed(NAMES):  # so that they are put back in the order of the table
        monkeypatch.delitem(SCORES_COLUMNS, name)
    with pytest.raises(VersionError, match=r"needs the features \['document_scores'\], which this reader does not"):
        StoreReader(rolled.url)


class Careless(type(SCORES_COLUMNS["pass_rate"])):  # type: ignore[misc]
    """The column of a program that checks nothing."""

    def check(self, values: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([2.0, 0.5], r"plane pass_rate: document 0 has 2, expected a number in \[0, 1\]"),
        ([0.5, 0.5, 0.5], "columns per document are of different numbers of documents"),
    ],
)
def test_bytes_that_no_writer_makes_are_damage(
    tokens: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[float], message: str
) -> None:
    column = SCORES_COLUMNS["pass_rate"]
    careless = Careless(**{name: getattr(column, name) for name in ("name", "feature", "low", "high", "bins")})
    monkeypatch.setitem(SCORES_COLUMNS, "pass_rate", careless)
    monkeypatch.setattr("potstill.storage.rows.row_checks.check_scores_columns", lambda more, spec: None)
    spec = targets_spec(1, tokens.digest, kind="scores", selection=None, teacher=None, stats=(), columns=NAMES)
    row = make_scores_row(tokens.tokens_rows([0])[0], spec)
    more = {"pass_rate": np.array(values, np.float32), "greedy_score": np.array([0.5, 0.5], np.float32)}
    StoreWriter.create(tmp_path / "s", spec).commit_unit(0, [replace(row, more=more)])
    seal_store(tmp_path / "s")
    monkeypatch.setitem(SCORES_COLUMNS, "pass_rate", column)
    with pytest.raises(CorruptError, match=message):
        StoreReader(tmp_path / "s").row(0)
    assert any(
        "pass_rate" in problem or "documents" in problem for problem in verify_store(tmp_path / "s", deep=True).problems
    )
