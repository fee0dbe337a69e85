"""Whatever stands in the place of any file or folder of a store, every door ends with its result or a StoreError."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from potstill.storage import (
    NotAStoreError,
    StoreError,
    StoreReader,
    StoreWriter,
    check_output,
    check_sealed,
    collect_garbage,
    discard_store,
    discard_unused,
    repair_store,
    rows_to_verify,
    seal_store,
    signature_findings,
    store_stats,
    store_status,
    verify_store,
)
from potstill.storage.files.absence import explain_absence
from potstill.storage.files.node_cache import NodeCache
from tests.storage.stores import make_targets_row, targets_spec, write_tokens

FREQUENCIES = np.arange(1000)
PLACES = ("run.json", "manifest.json", "index.arrow", "id_map.u32", "unit", "record", "units", "failures", "tmp", "")
INSTEAD = ("nothing", "a folder", "a file", "a circle of links", "a link to nothing")


def read_all(store):
    reader = StoreReader(store)
    return reader.rows(range(reader.num_rows)), dict(reader.row_stats)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A store of two units with a table of ids, and its tokens."""
    root = tmp_path_factory.mktemp("raw")
    tokens = write_tokens(root / "t", 6)
    write(root / "d", tokens)
    seal_store(root / "d")
    return root / "d", tokens


def write(store, tokens):
    spec = targets_spec(tokens.num_rows, tokens.digest)
    writer = StoreWriter.create(store, spec, id_frequencies=FREQUENCIES)
    for unit in writer.todo():
        writer.commit_unit(unit, [make_targets_row(row, spec) for row in tokens.tokens_rows(writer.unit_rows(unit))])
    writer.record_failure(0, "a test")


DOORS = {
    "read": read_all,
    "read in part": lambda store: StoreReader(store, allow_partial=True, num_units=1).row(0),
    "verify": lambda store: verify_store(store, deep=False),
    "verify --deep": lambda store: verify_store(store, deep=True).format(),
    "rows_to_verify": rows_to_verify,
    "status": store_status,
    "stats": store_stats,
    "gc": lambda store: collect_garbage(store, dry_run=True),
    "check_output": check_output,
    "check_sealed": check_sealed,
    "signature": lambda store: signature_findings(store, Path(__file__).with_name("absent")),
    "resume": StoreWriter.resume,
    "seal again": lambda store: seal_store(store, again=True),
    "repair": lambda store: repair_store(store, dry_run=True),
    # From here on the store may change.
    "gc --force": lambda store: collect_garbage(store, dry_run=False),
    "repair in earnest": repair_store,
    "write": write,
    "seal": seal_store,
    "force": lambda store, spec: StoreWriter.create(store, spec, force=True),
    "discard_unused": discard_unused,
    "discard_store": lambda store: discard_store(store, kind="targets", writer="a test"),
}
ALONE = DOORS.keys() - {"resume", "write", "force"}  # the others take the run or its tokens too


def put_instead(path, instead):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if instead == "a folder":
        path.mkdir()
    elif instead == "a file":
        path.write_bytes(b"something else")
    elif instead != "nothing":
        path.symlink_to(path.name if instead == "a circle of links" else "nowhere")


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place or "the store itself")
def test_every_door_ends_in_a_result_or_a_store_error(original, place, tmp_path, monkeypatch):
    monkeypatch.setattr("potstill.storage.store.reader.RETRY_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # 700 stores: nobody asks whether they survive a power cut
    raw, told = [], []
    spec = StoreReader(original[0]).spec
    for instead in INSTEAD:
        store = tmp_path / instead / "store"
        shutil.copytree(original[0], store)
        named = {"unit": next((store / "units").glob("*.arrow")), "record": store / "units" / "u0000000.json"}
        put_instead(named.get(place, store / place), instead)
        for name, door in DOORS.items():
            try:
                door(store) if name in ALONE else door(store, spec if name != "write" else original[1])
            except StoreError as error:
                told.append(str(error))
            except Exception as error:
                raw.append(f"{instead} for {place or 'the store'}: {name}: {type(error).__name__}: {error}")
    assert raw == []
    assert [text for text in told if str(tmp_path) not in text and "absent cannot be read" not in text] == []


def test_a_neighbour_that_may_not_be_looked_at_is_no_error():
    """A name that is wrong, beside a folder of somebody else: the hint is made without it."""
    root = Path(tempfile.mkdtemp(prefix="potstill_absence_"))
    try:
        root.chmod(0o755)
        (root / "closed").mkdir()
        (root / "closed").chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            assert "does not exist" in explain_absence(root / "quite another")
            assert explain_absence(root / "closed" / "inner")
            with pytest.raises((NotAStoreError, StoreError)):
                StoreReader(root / "closed")
        finally:
            os.seteuid(user)
    finally:
        (root / "closed").chmod(0o755)
        shutil.rmtree(root)


def test_a_cache_whose_folder_is_gone_only_stops_caching(tmp_path):
    cache = NodeCache(tmp_path / "cache", max_bytes=10)
    cache.put("a", b"12345678")
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("")
    cache._num_bytes = 100
    cache._evict()
    cache.put("b", b"12345678")
    assert cache.get("a") is None and cache.get("b") is None
