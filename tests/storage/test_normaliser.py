"""Targets whose writer has renormalised them: said in run.json, checked, and never taken for true probabilities."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.storage import (
    CorruptError,
    MismatchError,
    RunSpec,
    SparseTargets,
    StoreError,
    StoreReader,
    StoreWriter,
    TargetsRow,
    VersionError,
    format_row,
    seal_store,
    store_stats,
    verify_store,
)
from potstill.storage.rows import row_checks
from potstill.storage.store import spec as spec_module
from tests.storage.stores import kept_only, make_targets, targets_spec, write_kept, write_masked

NUM_ROWS = 5


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[StoreReader, StoreReader]:
    root = tmp_path_factory.mktemp("kept")
    tokens = write_masked(root / "t", NUM_ROWS)
    return tokens, write_kept(root / "d", tokens)


def test_they_come_back_without_a_tail(stores: tuple[StoreReader, StoreReader]) -> None:
    tokens, kept = stores
    for row, targets in zip(tokens.tokens_rows(range(NUM_ROWS)), kept.targets_rows(range(NUM_ROWS)), strict=True):
        wanted = kept_only(make_targets(row.row, len(row.tokens), places=row.has_target()))
        np.testing.assert_array_equal(targets.targets.ids, wanted.ids)
        np.testing.assert_array_equal(targets.targets.log_tail, wanted.log_tail)
        assert targets.targets.logprobs is not None and wanted.logprobs is not None
        assert np.abs(targets.targets.logprobs - wanted.logprobs)[wanted.logprobs > -15].max(initial=0) <= 1 / 32 + 1e-5
    assert kept.spec.required_features == ["planes", "kept_normaliser"]
    assert RunSpec.from_json(kept.spec.to_json()) == kept.spec and verify_store(kept.url, deep=True).ok
    assert "normaliser" not in targets_spec(1, "in").to_json()


def changed(targets: SparseTargets, **columns: Any) -> SparseTargets:
    assert targets.logprobs is not None
    tail = targets.log_tail.copy()
    tail[3] = columns.pop("tail", tail[3])
    shift = np.float32(columns.pop("shift", 0))
    return replace(targets, **(columns | {"log_tail": tail, "logprobs": targets.logprobs + shift}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tail": -9.0}, r"row 0: log_tail: token 3 holds -9.0, the normaliser of the run is `kept`"),
        (
            {"shift": -0.1},
            r"row 0: token 13: the entries sum to 0.904837, expected 1 within 0.001, because the normaliser",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    spec = targets_spec(1, "in", normaliser="kept", stats=())
    row = TargetsRow(0, 7, changed(kept_only(make_targets(0, 32)), **change))
    with pytest.raises(StoreError, match=message):
        StoreWriter.create(tmp_path / "d", spec).commit_unit(0, [row])


def test_verify_sees_what_another_program_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = targets_spec(1, "in", normaliser="kept", stats=())
    with monkeypatch.context() as patch:
        patch.setattr(row_checks, "check_kept_normaliser", lambda targets, strict: None)
        row = TargetsRow(0, 7, changed(kept_only(make_targets(0, 32)), shift=-0.1))
        StoreWriter.create(tmp_path / "d", spec).commit_unit(0, [row])
    seal_store(tmp_path / "d")
    [problem] = verify_store(tmp_path / "d", deep=True).problems
    assert "row 0: token " in problem and "expected 1 within 0.0324" in problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normaliser": "none"}, "normaliser is 'none', expected one of"),
        ({"selection": {"mode": "sample", "num_draws": 9}}, "found targets with draws"),
        ({"temperatures": (2.0,)}, "temperatures .* need the whole vocabulary"),
        ({"kind": "scores", "selection": None, "teacher": None}, "found scores"),
    ],
)
def test_runs_that_cannot_be_so_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        targets_spec(1, "in", **({"normaliser": "kept"} | change))


def test_field_and_feature_come_together(
    stores: tuple[StoreReader, StoreReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    value = stores[1].spec.to_json()
    for wrong in (value | {"required_features": ["planes"]}, value | {"normaliser": "vocabulary"}):
        with pytest.raises(CorruptError, match="feature kept_normaliser and field normaliser do not go together"):
            RunSpec.from_json(wrong)
    monkeypatch.setattr(spec_module, "OWN_FEATURES", ("planes", "frequency_ids"))
    with pytest.raises(VersionError, match=r"needs the features \['kept_normaliser'\]"):
        StoreReader(stores[1].url)


def test_a_run_is_not_resumed_with_the_other_normaliser(tmp_path: Path) -> None:
    spec = targets_spec(1, "in", normaliser="kept", stats=())
    row = TargetsRow(0, 7, kept_only(make_targets(0, 32)))
    StoreWriter.create(tmp_path / "d", spec).commit_unit(0, [row])
    with pytest.raises(MismatchError, match='normaliser is "kept" in the store, null is wanted now'):
        StoreWriter.create(tmp_path / "d", targets_spec(1, "in", stats=()))


def test_whoever_shows_them_says_that_the_tail_is_unknown(stores: tuple[StoreReader, StoreReader]) -> None:
    tokens, kept = stores
    text = format_row(tokens, kept, 0, str, 9, 3)
    assert "tail unknown" in text and "tail 0" not in text
    found = store_stats(kept.url)
    assert "kept mass" not in found.histograms and "kept count" in found.histograms
    assert "(normaliser kept): the mass outside is unknown" in found.format()
