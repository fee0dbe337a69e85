"""A remote index: fetched once by a node, checked, read there; statistics in one pass, shared and never trusted."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest

from potstill.storage import CorruptError, NodeFolder
from potstill.storage.files.paths import LocalFolder
from potstill.storage.store import index, index_copy
from potstill.storage.store.index import COLUMNS, RowIndex, StatColumns, encode_index

NUM_ROWS = 5 * 1024 + 77
STATS = ("loss", "entropy", "held")


class FarFolder(LocalFolder):
    """A folder that counts as remote, with the (offset, length) of each read."""

    parallel_reads = 4

    def __init__(self, root):
        super().__init__(root)
        self.reads: list[tuple[int, int]] = []

    def read_range(self, name, offset, length):
        self.reads.append((offset, length))
        return super().read_range(name, offset, length)


@pytest.fixture
def made(tmp_path):
    rng = np.random.default_rng(0)
    columns = {name: rng.integers(0, 1 << 20, NUM_ROWS).astype(dtype) for name, dtype in COLUMNS}
    columns |= {f"stat.{name}": rng.random(NUM_ROWS).astype(np.float32) for name in STATS}
    data, blocks = encode_index(columns, "fingerprint")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "index.arrow").write_bytes(data)
    return tmp_path / "store", columns, blocks, hashlib.sha256(data).hexdigest()


@pytest.fixture
def large(monkeypatch):
    """Makes every index one that is worth a copy, and every column one that is worth sharing."""
    monkeypatch.setattr(index, "COLUMN_READ_BYTES", 100_000)
    monkeypatch.setattr(index_copy, "RANGE_BYTES", 90_000)
    monkeypatch.setattr("potstill.storage.files.shared_arrays.SHARED_FROM_BYTES", 1)


def opened(made, node=None, sha256=None):
    root, _, blocks, digest = made
    folder, size = FarFolder(root), (root / "index.arrow").stat().st_size
    found = RowIndex(
        folder, "index.arrow", num_rows=NUM_ROWS, num_bytes=size, blocks=blocks, rows_per_block=1024, stats=STATS
    )
    if node is not None:
        found.keep_copy(node, sha256 or digest)
    return found, folder


def node_of(tmp_path, max_bytes=1 << 30):
    return NodeFolder(tmp_path / "node", max_bytes=max_bytes)


def same_blocks(found, columns, numbers=range(6)):
    for number in numbers:
        block = found.block(number)
        for name, values in columns.items():
            assert np.array_equal(block[name], values[number * 1024 : (number + 1) * 1024])


def test_an_index_is_fetched_once_in_large_ranges_and_read_from_the_copy(made, large, tmp_path):
    size = (made[0] / "index.arrow").stat().st_size
    found, folder = opened(made, node_of(tmp_path))
    assert folder.reads == []  # at the first look-up
    same_blocks(found, made[1])
    assert sorted(folder.reads) == [(at, min(90_000, size - at)) for at in range(0, size, 90_000)]
    again, other = opened(made, node_of(tmp_path))
    same_blocks(again, made[1])
    assert np.array_equal(again.column("stat.loss"), made[1]["stat.loss"]) and other.reads == []


def test_a_copy_that_is_damaged_or_cut_is_noticed_and_the_store_is_asked(made, large, tmp_path, caplog):
    found, _ = opened(made, node_of(tmp_path))
    found.block(0)
    (path,) = tmp_path.glob("node/*/index-*.arrow")
    data = path.read_bytes()
    place = made[2][3].offset + 50
    path.write_bytes(data[:place] + bytes([data[place] ^ 8]) + data[place + 1 :])
    hurt, folder = opened(made, node_of(tmp_path))
    same_blocks(hurt, made[1])
    assert "is a copy of the index no more" in caplog.text and "block does not fit its crc32" in caplog.text
    assert len(folder.reads) == 3 and not path.exists()  # blocks 3, 4 and 5
    caplog.clear()
    opened(made, node_of(tmp_path))[0].block(0)
    path.write_bytes(data[:-9])
    cut, folder = opened(made, node_of(tmp_path))
    same_blocks(cut, made[1])
    assert "it is fetched again" in caplog.text and path.read_bytes() == data
    os.truncate(path, 100)  # while it is open
    folder.reads.clear()
    assert np.array_equal(cut.column("unit"), made[1]["unit"]) and len(folder.reads) == 3


def test_what_the_store_gives_must_fit_the_manifest(made, large, tmp_path):
    found, _ = opened(made, node_of(tmp_path), sha256="0" * 64)
    with pytest.raises(CorruptError, match=r"index\.arrow: content does not fit the sha256 of the manifest; run `pots"):
        found.block(0)
    assert not list(tmp_path.glob("node/*/index-*.arrow")) and not list(tmp_path.glob("node/*/*.tmp"))


def test_without_room_for_a_copy_the_store_is_asked(made, large, tmp_path, caplog):
    found, folder = opened(made, node_of(tmp_path, max_bytes=1000))
    same_blocks(found, made[1])
    assert "no copy of its" in caplog.text and len(folder.reads) == 6


def test_a_small_remote_index_costs_one_read(made, tmp_path):
    found, folder = opened(made, node_of(tmp_path))
    same_blocks(found, made[1])
    assert len(folder.reads) == 1 and not list(tmp_path.glob("node/*/*"))


def test_columns_without_a_copy_are_read_in_large_pieces_once(made, large, monkeypatch):
    monkeypatch.setattr(index, "FAR_READ_BYTES", 200_000)
    found, folder = opened(made)
    columns = found.columns(["stat.loss", "offset"])
    assert all(np.array_equal(columns[name], made[1][name]) for name in columns)
    assert len(folder.reads) == 2


@pytest.mark.parametrize("with_copy", [False, True])
def test_statistics_of_a_node_are_read_in_one_pass_by_the_first(made, large, tmp_path, with_copy):
    digest, node = made[3], node_of(tmp_path)
    found, folder = opened(made, node if with_copy else None)
    stats = StatColumns(found, STATS, node=node, digest=digest)
    stats.expect(["entropy", "loss", "unknown"])
    assert np.array_equal(stats["loss"], made[1]["stat.loss"])
    num_reads = len(folder.reads)
    assert num_reads > 0 and np.array_equal(stats["entropy"], made[1]["stat.entropy"])
    assert len(folder.reads) == num_reads and not stats["entropy"].flags.writeable
    other, far = opened(made, node if with_copy else None)
    second = StatColumns(other, STATS, node=node, digest=digest)
    second.expect(["entropy", "loss"])
    assert np.array_equal(second["entropy"], made[1]["stat.entropy"]) and far.reads == []
    assert np.array_equal(second["held"], made[1]["stat.held"])  # alone, as nobody had said that it would be wanted
    (columns,) = [path for path in node.path.glob("*.arrays") if b'"entropy"' in path.read_bytes()]
    (tmp_path / "cut").write_bytes(columns.read_bytes()[:-3])
    os.replace(tmp_path / "cut", columns)
    third = StatColumns(opened(made)[0], STATS, node=node, digest=digest)
    third.expect(["entropy", "loss"])
    assert np.array_equal(third["loss"], made[1]["stat.loss"])
