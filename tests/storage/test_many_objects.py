"""Many units on an object store, with "many" set low: listings side by side, few requests, an index in parts."""

from __future__ import annotations

import pytest

pytest.importorskip("obstore")
pytest.importorskip("moto.server")

from potstill.storage import StoreReader, StoreWriter, UnsealedError, check_sealed, seal_store, verify_store
from potstill.storage.files import object_paths
from potstill.storage.files.commit import record_name
from potstill.storage.files.paths import open_folder
from potstill.storage.store import presence
from tests.storage.stores import make_targets_row, targets_spec
from tests.storage.test_objects import NUM_ROWS as NUM_LOCAL
from tests.storage.test_objects import commit_all, environment, local, s3  # noqa: F401

PAGE = 5
FOREIGN = ("a", "u", "u0000003", "u0000003.json.x", "u9999999.json", "v", "z" * 40)


@pytest.fixture(autouse=True)
def patience(environment, monkeypatch):  # noqa: F811
    """What counts here are requests; one that is slow on a busy machine must not be made again."""
    monkeypatch.setattr(object_paths, "READ_TIMEOUT_SECONDS", 20.0)
    monkeypatch.setattr(object_paths, "REQUEST_TIMEOUT_SECONDS", 20.0)


@pytest.fixture
def pages(monkeypatch):
    """Listings come in pages of five."""
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", str(PAGE))
    monkeypatch.setattr(object_paths, "PAGE_OBJECTS", PAGE)


def requests_of(s3, work):  # noqa: F811
    before = len(s3.requests)
    work()
    return [(method, path) for method, path, _ in s3.requests[before:]]


def lists(requests):
    return [path for method, path in requests if method == "GET" and "list-type" in path]


@pytest.mark.parametrize("num_objects", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, PAGE)), 23])
def test_cuts_change_nothing_that_is_listed(s3, pages, num_objects):  # noqa: F811
    folder = open_folder(f"s3://bucket/listed {num_objects}")
    names = [record_name(unit) for unit in range(num_objects)] + list(FOREIGN[: num_objects and None])
    for name in names:
        folder.put(f"units/{name}", name.encode())
    folder.put("units/deeper/u0000001.json", b"none of ours")
    folder.put("units-beside", b"nor this")
    plain = folder.listing("units")
    assert list(plain) == sorted(names) and all(plain[name].num_bytes == len(name) for name in names)
    for cuts in (
        [record_name(unit) for unit in (4, 9, 15)],
        [record_name(3), record_name(4), "u5", "zz"],
        ["a", "u0000003"],
        [record_name(unit) for unit in range(60)],
    ):
        found: dict = {}
        asked = lists(requests_of(s3, lambda cuts=cuts, found=found: found.update(folder.listing("units", cuts=cuts))))
        assert found == plain and list(found) == list(plain), cuts
        whole_pages = -(-(len(names) + 1) // PAGE)
        assert len(asked) <= whole_pages + len(cuts) + 1
        if num_objects < PAGE - 1 and not names:
            assert len(asked) == 1, "an empty store costs one request"
    assert folder.names("units", cuts=["u0000002.json"]) == sorted(names)
    assert list(folder.listing("units", suffix=".json")) == [name for name in sorted(names) if name.endswith(".json")]


@pytest.mark.slow
def test_a_listing_in_parts_is_whole_in_spite_of_faults(s3, pages):  # noqa: F811
    folder = open_folder("s3://bucket/faulty")
    names = [record_name(unit) for unit in range(23)]
    for name in names:
        folder.put(f"units/{name}", b"x")
    met: set[str] = set()

    def choose(method, path, number):
        if method == "GET" and "list-type" in path and path not in met:
            met.add(path)
            return ("503", "reset", "500")[len(met) % 3]
        return None

    s3.fault = choose
    assert folder.names("units", cuts=[record_name(unit) for unit in (6, 12, 18)]) == names
    assert len(met) >= 4


def test_a_worker_of_many_asks_for_its_own_units_by_name(s3, local, monkeypatch):  # noqa: F811
    """Of many workers each would list everything: its own records are fewer than the pages."""
    url = "s3://bucket/own"
    spec = targets_spec(NUM_LOCAL, local[0].digest)
    writer = StoreWriter.create(url, spec)
    writer.commit_unit(1, [make_targets_row(local[0].row(r), spec) for r in writer.unit_rows(1)])
    open_folder(url).put(f"units/{record_name(2)}", b"torn")
    writer.commit_unit(2, [make_targets_row(local[0].row(r), spec) for r in writer.unit_rows(2)])
    monkeypatch.setattr(presence, "_PAGE_OBJECTS", 1)
    found: dict[int, list[int]] = {}

    def start(worker):
        again = StoreWriter.create(url, spec)
        assert not check_sealed(url, spec=spec)
        found[worker] = again.todo(worker=worker, num_workers=3)

    for worker, generations in ((0, 1), (1, 1), (2, 4)):  # of a torn one: three looks, and the next generation
        asked = requests_of(s3, lambda worker=worker: start(worker))
        assert not lists(asked) and {method for method, _ in asked} == {"GET"}
        assert len(asked) == 2 + generations, "run.json, the manifest, and its records"
    assert found == {0: [0], 1: [], 2: []}
    commit_all(writer, local)
    assert seal_store(url).store_digest == local[1].digest


@pytest.mark.slow
def test_an_index_that_one_request_cannot_create_is_uploaded_in_parts(s3, local, monkeypatch):  # noqa: F811
    url = "s3://bucket/large index"
    writer = StoreWriter.create(url, targets_spec(NUM_LOCAL, local[0].digest))
    commit_all(writer, local)
    monkeypatch.setattr(object_paths.ObjectFolder, "max_create_bytes", 100)
    monkeypatch.setattr(object_paths, "PART_BYTES", 5 << 20)
    manifest = seal_store(url)
    assert manifest.index_file == f"index-{manifest.index_sha256[:12]}.arrow"
    assert StoreReader(url).digest == local[1].digest and verify_store(url, deep=True).ok
    open_folder(url).delete("manifest.json")
    assert seal_store(url).index_file == manifest.index_file, "a second sealer writes the same bytes to the same name"


@pytest.mark.slow
def test_a_record_of_many_that_cannot_be_read_is_made_again(s3, local, monkeypatch):  # noqa: F811
    url = "s3://bucket/many damaged"
    spec = targets_spec(NUM_LOCAL, local[0].digest)
    monkeypatch.setattr(presence, "FEW_REMOTE", 1)
    commit_all(StoreWriter.create(url, spec), local)
    folder = open_folder(url)
    good = folder.read(f"units/{record_name(1)}", max_bytes=1 << 20)
    folder.put(f"units/{record_name(1)}", good.replace(b"stats", b"stets"))
    assert StoreWriter.create(url, spec).todo() == []
    with pytest.raises(UnsealedError, match=r"1 of 3 units are missing \(first: \[1\]\)"):
        seal_store(url, fast=True)
    writer = StoreWriter.create(url, spec)
    assert writer.todo() == [1]
    commit_all(writer, local)
    assert seal_store(url).store_digest == local[1].digest
