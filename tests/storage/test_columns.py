"""A new column of targets is one entry of one table: it is stored, checked, read, joined and handed to the losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from potstill.kernels.types import KernelInputError, SparseTargetTensors
from potstill.storage import (
    COLUMNS,
    Column,
    EpochPlan,
    Loader,
    RunSpec,
    SparseTargets,
    StoreError,
    StoreReader,
    StoreWriter,
    TargetsRow,
    VersionError,
    concatenate,
    seal_store,
    store_stats,
    verify_store,
)
from potstill.storage.rows import value_grid
from potstill.storage.rows.codec import planes_of
from potstill.storage.rows.column import Array, Examined
from potstill.student_train.data.batch import map_tensors
from potstill.teacher_dump.selection import HostBatch, cut_rows
from tests.storage.stores import make_targets_row, targets_spec, write_tokens

NUM_ROWS = 6


# What somebody adds: all of a column.
def check_margin(values: Array, name: str, found: Examined) -> None:
    if not (values >= 0).all():
        raise StoreError(f"{name}: token {int((values < 0).argmax())} holds {values.min()}, expected >= 0")


MARGIN = Column(
    name="margin",  # log-probability of the first entry over that of the second, nats
    axis="token",
    dtype=np.float32,
    num_planes=lambda spec: 2,
    encode=lambda values, coding: value_grid.encode_fine(values),
    decode=lambda planes, coding: value_grid.decode_fine(*planes),
    check=check_margin,
    feature="margins",
    optional=True,
)
# The same for a vector per row, and for a value per entry.
SUMMARY = Column(
    name="summary",
    axis="row",
    dtype=np.float16,
    vector=lambda spec: int(spec.info["summary_size"]),
    value_bytes=2,
    encode=lambda values, coding: (np.frombuffer(values.astype("<f2").tobytes(), np.uint8),),
    decode=lambda planes, coding: np.frombuffer(planes[0].tobytes(), "<f2").reshape(
        -1, int(coding.spec.info["summary_size"])
    ),
    feature="summaries",
)
MARK = Column(
    name="mark",
    axis="entry",
    dtype=np.uint8,
    encode=lambda values, coding: (values,),
    decode=lambda planes, coding: planes[0],
    feature="marks",
    optional=True,
)
ADDED = (MARGIN, SUMMARY, MARK)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    for column in ADDED:
        monkeypatch.setitem(COLUMNS, column.name, column)


def with_columns(row: TargetsRow, names: tuple[str, ...] = ("margin", "summary", "mark")) -> TargetsRow:
    """The row with made-up values of the added columns, on their grids."""
    rng = np.random.default_rng([3, row.row])
    values: dict[str, Array] = {
        "margin": (rng.integers(0, 5000, row.targets.num_tokens) / 256).astype(np.float32),
        "summary": rng.normal(size=(1, 5)).astype(np.float16),
        "mark": rng.integers(0, 2, row.targets.num_entries).astype(np.uint8),
    }
    return replace(row, targets=changed(row.targets, **{name: values[name] for name in names}))


def changed(targets: SparseTargets, **columns: Any) -> SparseTargets:
    return replace(targets, **columns)


def value(targets: SparseTargets | SparseTargetTensors, name: str) -> Any:
    """The array or tensor of an added column."""
    return targets.columns[name]


class Stores:
    """A tokens store, and a targets store with the added columns and what was put into it."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.tokens = write_tokens(folder / "tokens", NUM_ROWS, last_tokens=20)
        values: dict[str, Any] = {"columns": ("margin", "summary", "mark"), "info": {"summary_size": 5}}
        self.spec = targets_spec(NUM_ROWS, self.tokens.digest, temperatures=(2.0,), **(values | changes))
        self.path = folder / "targets"
        self.rows = [
            with_columns(make_targets_row(row, self.spec), self.spec.columns)
            for row in self.tokens.tokens_rows(range(NUM_ROWS))
        ]

    def write(self) -> StoreReader:
        writer = StoreWriter.create(self.path, self.spec)
        for unit in writer.todo():
            writer.commit_unit(unit, [self.rows[number] for number in writer.unit_rows(unit)])
        seal_store(self.path)
        return StoreReader(self.path)


@pytest.fixture
def stores(tmp_path: Path) -> Stores:
    return Stores(tmp_path)


def same(found: SparseTargets, wanted: SparseTargets) -> bool:
    """Equality of the added columns, and of what the grids do not touch."""
    names = [column.name for column in ADDED]
    return np.array_equal(found.ids, wanted.ids) and all(
        value(found, name).dtype == value(wanted, name).dtype
        and np.array_equal(value(found, name), value(wanted, name))
        for name in names
    )


def test_it_is_stored_and_verified(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = stores.write()
    assert reader.spec.to_json()["columns"] == ["margin", "summary", "mark"]
    assert reader.spec.to_json()["required_features"] == ["planes", "margins", "summaries", "marks"]
    for number, wanted in enumerate(stores.rows):
        assert same(reader.targets_rows([number])[0].targets, wanted.targets)
    assert verify_store(stores.path, deep=True).ok
    sizes = store_stats(stores.path).column_bytes
    assert list(sizes)[-4:] == ["margin0", "margin1", "summary", "mark"] and all(sizes.values())
    # Its rule is checked again on what was read back.
    monkeypatch.setitem(COLUMNS, "margin", replace(MARGIN, check=refuse_all))
    findings = verify_store(stores.path, deep=True).findings
    assert sum(last - first + 1 for found in findings for first, last in found.rows) == NUM_ROWS
    assert all("margin: refused" in found.text for found in findings)


def refuse_all(values: Array, name: str, found: Examined) -> None:
    raise StoreError(f"{name}: refused")


def test_a_reader_without_it_refuses_the_store(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = stores.write()
    monkeypatch.delitem(COLUMNS, "margin")
    with pytest.raises(VersionError, match=r"needs the features \['margins'\], which this reader does not know"):
        StoreReader(reader.url)
    # Nor does it take the column for its own where the feature is not named.
    with pytest.raises(VersionError, match=r"has the columns \['margin'\]"):
        RunSpec.from_json(reader.spec.to_json() | {"required_features": ["planes", "summaries", "marks"]})


def test_column_and_feature_come_together(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    value = stores.spec.to_json()
    with pytest.raises(VersionError, match="margin and the feature margins come together"):
        RunSpec.from_json(value | {"required_features": ["planes", "summaries", "marks"]})
    with pytest.raises(StoreError, match="column bare: needs a feature"):
        replace(MARGIN, name="bare", feature=None)
    monkeypatch.setitem(COLUMNS, "twin", replace(MARGIN, name="twin", plane="margin"))
    both = replace(stores.spec, columns=("margin", "twin"))
    with pytest.raises(StoreError, match=r"share the planes \['margin0', 'margin1'\]"):
        planes_of(both)
    with pytest.raises(StoreError, match=r"columns \('entropy',\) must be distinct and among \['margin'"):
        targets_spec(1, "in", columns=("entropy",))


def test_a_store_without_it_is_written_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_table = Stores(tmp_path / "a", columns=(), info={}).write()
    for column in ADDED:
        monkeypatch.delitem(COLUMNS, column.name)
    without = Stores(tmp_path / "b", columns=(), info={}).write()
    assert with_table.digest == without.digest and "columns" not in without.spec.to_json()


def test_it_may_be_left_out(stores: Stores, tmp_path: Path) -> None:
    stores.write()
    found = StoreReader(stores.path, skip=("margin", "summary")).targets_rows([1])[0].targets
    assert "margin" not in found.columns and "summary" not in found.columns and "mark" in found.columns
    # Optional: the rows of a store may come without it.
    plain = Stores(tmp_path / "plain")
    plain.rows = [replace(row, targets=changed(row.targets, margin=None, mark=None)) for row in plain.rows]
    found = plain.write().targets_rows([0])[0].targets
    assert "margin" not in found.columns and "mark" not in found.columns
    assert verify_store(plain.path, deep=True).ok


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margin": np.full(32, -1, np.float32)}, "row 0: margin: token 0 holds -1.0, expected >= 0"),
        ({"margin": np.ones(3, np.float32)}, "row 0: margin: found 3 values for 32 tokens"),
        ({"mark": np.ones(3, np.uint8)}, "row 0: mark: found 3 values for"),
        ({"summary": None}, "row 0: summary does not fit: the run names the column"),
        ({"summary": np.ones((2, 5), np.float16)}, "row 0: summary: found 2 values, expected one for the row"),
        ({"summary": np.ones((1, 4), np.float16)}, "row 0: summary: found vectors of 4, the run says 5"),
    ],
)
def test_what_does_not_fit_is_refused(stores: Stores, change: dict[str, Any], message: str) -> None:
    stores.rows[0] = replace(stores.rows[0], targets=changed(stores.rows[0].targets, **change))
    with pytest.raises(StoreError, match=message):
        stores.write()


def test_what_the_run_does_not_name_is_refused(tmp_path: Path) -> None:
    stores = Stores(tmp_path, columns=("summary", "mark"))
    stores.rows[0] = with_columns(stores.rows[0])
    with pytest.raises(StoreError, match=r"margin does not fit: the run does not name the column; .*'summary', 'mark'"):
        stores.write()
    with pytest.raises(StoreError, match=r"targets have no columns \['margins'\]"):
        changed(stores.rows[0].targets, margins=np.zeros(32, np.float32))
    with pytest.raises(StoreError, match=r"margin: found dtype int64, expected float32"):
        SparseTargets.build(
            offsets=[0, 1], ids=[3], logprobs=[-1.0], log_tail=[-1.0], margin=np.array([1]), vocab_size=9
        )


def test_it_is_cut_joined_and_loaded(stores: Stores) -> None:
    reader = stores.write()
    whole = concatenate([row.targets for row in stores.rows])
    assert same(concatenate([row.targets for row in reader.targets_rows(range(NUM_ROWS))]), whole)
    assert value(whole, "summary").shape == (NUM_ROWS, 5)
    part = whole.slice(32, 64, rows=slice(1, 2))
    assert same(part, stores.rows[1].targets)
    # A row without entries has no bytes of an optional value of entries, and joins all the same.
    none = changed(SparseTargets.empty(3, spec=stores.spec), mark=None)
    joined = concatenate([none, stores.rows[0].targets])
    assert np.array_equal(value(joined, "mark"), value(stores.rows[0].targets, "mark"))
    with pytest.raises(StoreError, match="some parts have mark and some have not"):
        concatenate([stores.rows[0].targets, changed(stores.rows[1].targets, mark=None)])
    with Loader(EpochPlan(NUM_ROWS, global_batch=3, seed=0, joined=["t"]), stores.tokens, {"t": reader}) as loader:
        batch = next(loader)
        for row in batch.joined["t"]:
            assert isinstance(row, TargetsRow) and same(row.targets, stores.rows[row.row].targets)


@pytest.mark.parametrize("page_locked", [False, True])
def test_it_is_pinned_as_the_loader_pins(stores: Stores, page_locked: bool) -> None:
    if page_locked and not torch.cuda.is_available():
        pytest.skip("page-locked memory needs a CUDA device")
    given = SparseTargetTensors.from_arrays(stores.rows[2].targets)
    copy = map_tensors(given, torch.Tensor.pin_memory if page_locked else torch.clone)
    assert copy.axes == given.axes and copy.num_draws == given.num_draws
    pairs: list[tuple[str, Any, Any]] = [("offsets", copy.offsets, given.offsets)]
    for name, values in given.columns.items():
        for key in values if isinstance(values, dict) else [None]:
            made = copy.columns[name]
            pairs.append((name, made, values) if key is None else (name, made[key], values[key]))
    assert {name for name, _, _ in pairs} >= {"ids", "log_tail_at", "margin", "summary", "mark"}
    for name, made, own in pairs:
        assert torch.equal(made, own) and made.data_ptr() != own.data_ptr(), name
        assert not page_locked or made.is_pinned(), name


def test_it_reaches_the_tensors(stores: Stores) -> None:
    whole = concatenate([row.targets for row in stores.rows])
    tensors = SparseTargetTensors.from_arrays(whole)
    # Label columns are for readers on the host; what is added goes along.
    assert set(tensors.columns) == {"ids", "logprobs", "log_tail", "log_tail_at", "margin", "summary", "mark"}
    assert tensors.axes["margin"] == "token" and tensors.axes["summary"] == "row" and tensors.axes["mark"] == "entry"
    margin, mark = (torch.from_numpy(value(whole, name)) for name in ("margin", "mark"))
    chosen = torch.tensor([40, 3, 3])
    picked = tensors.select(chosen)
    assert torch.equal(value(picked, "margin"), margin[chosen])
    spans = [mark[whole.offsets[n] : whole.offsets[n + 1]] for n in chosen.tolist()]
    assert torch.equal(value(picked, "mark"), torch.cat(spans))
    assert value(picked, "summary").shape == (NUM_ROWS, 5)
    wide = value(picked.spread(torch.tensor([1, 2, 5]), num_tokens=7), "margin")
    assert torch.equal(wide[[1, 2, 5]], margin[chosen]) and not wide[[0, 3, 4, 6]].any()
    moved = picked.to("cuda" if torch.cuda.is_available() else "meta")
    assert {t.device.type for t in (moved.offsets, *(value(moved, column.name) for column in ADDED))} == {
        "cuda" if torch.cuda.is_available() else "meta"
    }
    with pytest.raises(KernelInputError, match=r"columns \['margin'\] have no axis"):
        SparseTargetTensors(offsets=tensors.offsets, ids=tensors.ids, margin=margin)
    again = SparseTargetTensors.from_arrays(picked)
    assert again.axes == picked.axes and torch.equal(value(again, "margin"), value(picked, "margin"))


def test_an_object_with_arrays_by_name_gives_tensors_too(stores: Stores) -> None:
    targets = stores.rows[0].targets
    plain = SimpleNamespace(
        offsets=targets.offsets, ids=targets.ids, logprobs=targets.logprobs, log_tail=targets.log_tail, counts=None
    )
    found = SparseTargetTensors.from_arrays(plain)
    assert set(found.columns) == {"ids", "logprobs", "log_tail"} and found.num_draws is None
    assert found.max_entries == int(np.diff(targets.offsets).max())


def test_a_dump_cuts_it_into_rows(stores: Stores) -> None:
    rows = stores.tokens.tokens_rows([0, 1])
    places = [np.setdiff1d(np.arange(len(row.tokens)), np.cumsum(row.doc_lens) - 1) for row in rows]
    num = sum(len(at) for at in places)
    margin = np.arange(num, dtype=np.float32)
    targets = SparseTargets(
        offsets=np.arange(num + 1),
        ids=np.arange(num, dtype=np.int32),
        logprobs=np.full(num, -0.5, np.float32),
        log_tail=np.full(num, -1, np.float32),
        entropy=np.full(num, 1, np.float32),
        label_logprob=np.full(num, -1, np.float32),
        label_rank=np.zeros(num, np.int32),
        margin=margin,
        summary=np.arange(10, dtype=np.float16).reshape(2, 5),
        mark=np.ones(num, np.uint8),
    )
    lse = np.zeros(num, np.float32)
    lse[0] = np.nan
    found = HostBatch(targets=targets, excluded_mass=np.zeros(num, np.float32), lse=lse)
    (bad, reason), (good, fine) = cut_rows(found, rows)
    assert reason is not None and bad.targets.num_entries == 0 and not value(bad.targets, "margin").any()
    assert fine is None and np.array_equal(value(good.targets, "summary"), [[5, 6, 7, 8, 9]])
    values = value(good.targets, "margin")
    assert np.array_equal(values[places[1]], margin[len(places[0]) :])
    assert np.count_nonzero(values) == len(places[1])
