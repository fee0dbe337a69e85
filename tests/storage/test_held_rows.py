"""Targets of some rows only: a row that was left out is never read as one of which the teacher says nothing."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from potstill.storage import (
    CorruptError,
    EpochPlan,
    Loader,
    MismatchError,
    RowDataset,
    RunSpec,
    StoreError,
    StoreReader,
    StoreWriter,
    TargetsRow,
    VersionError,
    held_mask,
    held_rows,
    only_rows_field,
    seal_store,
    store_stats,
    verify_store,
)
from potstill.storage.rows import row_checks
from potstill.storage.store import spec as spec_module
from potstill.storage.store.self_check import _some_rows as some_rows
from tests.storage.independent_reader import read_store
from tests.storage.stores import make_targets_row, targets_spec, write_tokens

NUM_ROWS, HELD_ROWS = 9, [1, 2, 6, 8]


def rows_of(tokens: StoreReader, spec: RunSpec, *, mark: dict[int, float] | None = None) -> list[TargetsRow]:
    rows = []
    for number in range(NUM_ROWS):
        row = make_targets_row(tokens.row(number), targets_spec(NUM_ROWS, tokens.digest))
        held = number in HELD_ROWS
        targets = row.targets if held else row.targets.without_targets(row.targets.num_tokens)
        stats = {"mean_loss": number + 0.5 if held else 0.0, "held": (mark or {}).get(number, float(held))}
        rows.append(TargetsRow(number, row.token_digest, targets, stats))
    return rows


def spec_of(tokens: StoreReader, rows: list[int] = HELD_ROWS) -> RunSpec:
    field = only_rows_field(held_mask(rows, NUM_ROWS))
    return targets_spec(NUM_ROWS, tokens.digest, stats=("mean_loss", "held"), only_rows=field)


def write(path: Path, spec: RunSpec, rows: list[TargetsRow]) -> StoreReader:
    writer = StoreWriter.create(path, spec)
    for unit in range(writer.num_units or 0):
        writer.commit_unit(unit, [rows[row] for row in writer.unit_rows(unit)])
    seal_store(path)
    return StoreReader(path)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[StoreReader, StoreReader]:
    root = tmp_path_factory.mktemp("held")
    tokens = write_tokens(root / "t", NUM_ROWS)
    spec = spec_of(tokens)
    return tokens, write(root / "d", spec, rows_of(tokens, spec))


def test_a_row_that_was_left_out_is_an_error_that_names_it(stores: tuple[StoreReader, StoreReader]) -> None:
    tokens, few = stores
    found = held_rows(few)
    assert found is not None and found.tolist() == HELD_ROWS and held_rows(tokens) is None
    words = r"row 3 was left out of this store, which holds 4 of 9 rows.*potstill dump --only-rows-of RUN\.yaml"
    data = RowDataset(tokens, {"few": few})
    with pytest.raises(MismatchError, match=words):
        data.__getitems__([2, 3, 1])
    assert [sample.targets("few").row for sample in data.__getitems__([8, 1])] == [8, 1]
    plan = EpochPlan(NUM_ROWS, global_batch=NUM_ROWS, seed=0, joined=["few"])
    with Loader(plan, tokens, {"few": few}) as loader, pytest.raises(MismatchError, match="was left out of this store"):
        next(loader)
    plan = EpochPlan(NUM_ROWS, global_batch=4, seed=0, joined=["few"], rows=HELD_ROWS)
    with Loader(plan, tokens, {"few": few}) as loader:
        assert sorted(next(loader).rows.tolist()) == HELD_ROWS


def test_what_looks_at_some_rows_looks_at_those_that_it_holds(stores: tuple[StoreReader, StoreReader]) -> None:
    _, few = stores
    assert some_rows(few, 16) == HELD_ROWS and set(some_rows(few, 1)) < set(HELD_ROWS)
    stats = store_stats(few.url)
    assert stats.sampled_rows == 4 and "holds 4 of its 9 rows, no others" in stats.format()
    assert verify_store(few.url, deep=True).ok
    run, _, rows = read_store(few.url)
    held = [number for number, row in enumerate(rows) if row["stats"]["held"] == 1]
    ids = hashlib.sha256(struct.pack(f"<{len(held)}q", *held)).hexdigest()
    assert held == HELD_ROWS and run["only_rows"] == {"count": 4, "sha256": ids}


def test_field_and_feature_come_together(stores: tuple[StoreReader, StoreReader], monkeypatch) -> None:
    _, few = stores
    assert few.spec.required_features == ["planes", "only_rows"] and RunSpec.from_json(few.spec.to_json()) == few.spec
    assert "only_rows" not in targets_spec(1, "in").to_json()
    value = few.spec.to_json()
    for wrong in (value | {"required_features": ["planes"]}, {k: v for k, v in value.items() if k != "only_rows"}):
        with pytest.raises(CorruptError, match="feature only_rows and field only_rows do not go together"):
            RunSpec.from_json(wrong)
    with pytest.raises(StoreError, match="needs the statistic 'held'"):
        replace(few.spec, stats=("mean_loss",))
    with pytest.raises(StoreError, match="expected a count from 1 on and a sha256"):
        replace(few.spec, only_rows={"count": 3})
    with pytest.raises(StoreError, match="1 rows of a store of 9 were named"):
        held_mask([9], NUM_ROWS)
    monkeypatch.setattr(spec_module, "OWN_FEATURES", ("planes",))
    with pytest.raises(VersionError, match=r"needs the features \['only_rows'\]"):
        StoreReader(few.url)


def test_another_set_of_rows_is_another_run(stores: tuple[StoreReader, StoreReader]) -> None:
    tokens, few = stores
    for other in (spec_of(tokens, [1, 2]), targets_spec(NUM_ROWS, tokens.digest)):
        with pytest.raises(MismatchError, match=r"another run stands here: .*only_rows"):
            StoreWriter.create(few.url, other)


@pytest.mark.parametrize(
    ("mark", "message"),
    [({1: 0.0}, r"the row was left out .held 0. and has \d+ entries"), ({0: 0.5}, "statistic held is 0.5")],
)
def test_what_does_not_fit_is_refused_by_writer_and_verify(tmp_path: Path, stores, monkeypatch, mark, message) -> None:
    spec = spec_of(stores[0])
    rows = rows_of(stores[0], spec, mark=mark)
    with pytest.raises(StoreError, match=message):
        write(tmp_path / "d", spec, rows)
    with monkeypatch.context() as patch:
        patch.setattr(row_checks, "check_held_row", lambda stats, num_entries: None)
        write(tmp_path / "e", spec, rows)
    problems = verify_store(tmp_path / "e", deep=True).problems
    assert len(problems) == 2 and "rows held make" in problems[1]
