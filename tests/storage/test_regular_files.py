"""Only regular files are read: what stands in place of one is an error that names it; links to files are fine."""

from __future__ import annotations

import os
import shutil
import socket
import time
import tracemalloc
from pathlib import Path

import pytest

from potstill.storage import CorruptError, StoreError, StoreReader, StoreWriter, seal_store, store_status, verify_store
from potstill.storage.files.commit import max_record_bytes, read_record
from potstill.storage.files.node_cache import NodeCache
from potstill.storage.files.paths import LocalFolder
from tests.storage.stores import make_targets_row, same_targets, targets_spec, write_targets, write_tokens

NUM_ROWS = 8
AT_ONCE = 2.0


def fifo(path: Path) -> None:
    os.mkfifo(path)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may be no longer than 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path.name)


KINDS = {
    fifo: "a named pipe",
    zeros: "a device",
    unix_socket: "a socket",
    folder: "a folder",
    loop: "a symbolic link that leads to itself",
}
PLACES = {"run.json": "run.json", "manifest": "manifest.json", "index": "index.arrow", "record": "units/u0000001.json"}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("regular")
    tokens = write_tokens(root / "t", NUM_ROWS)
    return write_targets(root / "d", tokens), tokens


@pytest.fixture
def store(original, tmp_path):
    shutil.copytree(original[0].url, tmp_path / "store")
    return tmp_path / "store"


def unit_of(store: Path, unit: int) -> Path:
    return next((store / "units").glob(f"u{unit:07d}-*.arrow"))


def replace(path: Path, make) -> None:
    path.unlink()
    make(path)


def read_all(path):
    reader = StoreReader(path)
    return [reader.row(row) for row in range(reader.num_rows)]


def verify(path):
    report = verify_store(path, deep=True)
    if not report.ok:
        raise CorruptError("\n".join(report.problems))


def said_by(command, store):
    with pytest.raises(CorruptError) as caught:
        command(store)
    return str(caught.value)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("place", ["run.json", "manifest", "index", "unit"])
def test_what_is_no_regular_file_is_named_at_once(store, place, make):
    path = unit_of(store, 1) if place == "unit" else store / PLACES[place]
    replace(path, make)
    for command in (read_all, verify, StoreReader if place == "index" else seal_store):
        if (place, command) == ("unit", seal_store):
            continue  # a sealed store is not sealed again
        started = time.monotonic()
        assert f"{path.name} is {KINDS[make]}, expected a regular file; take it" in said_by(command, store)
        assert time.monotonic() - started < AT_ONCE


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_a_record_that_is_no_regular_file_counts_as_none_and_is_written_again(store, original, make, caplog):
    reader, tokens = original
    replace(store / PLACES["record"], make)
    for name in ("manifest.json", "index.arrow"):
        (store / name).unlink()
    started = time.monotonic()
    writer = StoreWriter.create(store, reader.spec)
    assert writer.todo() == [1]
    assert writer.commit_unit(1, [make_targets_row(tokens.row(row), reader.spec) for row in writer.unit_rows(1)])
    assert f"u0000001.json is {KINDS[make]}" in caplog.text
    assert writer.todo() == [] and seal_store(store).store_digest == reader.digest
    assert all(same_targets(reader.row(row.row).targets, row.targets) for row in read_all(store))
    assert time.monotonic() - started < AT_ONCE


@pytest.mark.parametrize("place", ["run.json", "manifest", "index", "record", "unit"])
def test_a_link_to_a_regular_file_is_the_file(store, original, tmp_path, place):
    """Of a record too: the worker that looks for what is to do, and the seal, see the same."""
    path = unit_of(store, 1) if place == "unit" else store / PLACES[place]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert StoreWriter.create(store, original[0].spec).todo() == [] and store_status(store).committed == 2
    assert verify_store(store, deep=True).ok and seal_store(store).store_digest == original[0].digest
    (tmp_path / "elsewhere").unlink()
    if place == "record":
        assert StoreWriter.create(store, original[0].spec).todo() == [1] and store_status(store).committed == 1
    elif place == "unit":
        with pytest.raises(CorruptError, match="file is missing"):
            read_all(store)


@pytest.mark.parametrize("place", ["run.json", "record"])
def test_a_file_that_is_too_large_is_not_read(store, original, place):
    os.truncate(store / PLACES[place], 100 << 20)  # sparse: takes no room
    tracemalloc.start()
    try:
        if place == "run.json":
            with pytest.raises(CorruptError, match=r"run\.json: 104857600 bytes, at most 16777216 expected"):
                StoreReader(store)
        else:
            assert read_record(LocalFolder(store), 1, original[0].spec) is None
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_the_bound_of_a_record_grows_with_its_rows():
    assert max_record_bytes(targets_spec(8, "in")) == (64 << 20) + 4 * 4096
    assert max_record_bytes(targets_spec(8, "in", rows_per_unit=1 << 24)) == 1 << 30


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_an_entry_of_the_node_cache_that_is_no_file_is_read_from_the_store(store, tmp_path, make):
    wanted = read_all(store)
    reader = StoreReader(store, cache_dir=tmp_path / "cache")
    reader.row(0)
    (entry,) = (tmp_path / "cache").iterdir()
    replace(entry, make)
    assert same_targets(StoreReader(store, cache_dir=tmp_path / "cache").row(0).targets, wanted[0].targets)


def test_a_cache_that_cannot_be_made_is_a_store_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=f"node cache {tmp_path / 'file'}: cannot be made or listed"):
        NodeCache(tmp_path / "file", max_bytes=1000)


def test_listing_a_folder_that_cannot_be_listed_is_a_store_error(store):
    shutil.rmtree(store / "units")
    (store / "units").symlink_to("units")
    with pytest.raises(StoreError, match="units: cannot be listed"):
        store_status(store)
