"""The node cache: same rows, fewer reads, bounded size, damage noticed."""

from __future__ import annotations

import os
import sys

import pytest

from potstill.storage import StoreReader
from potstill.storage.files.node_cache import NodeCache
from potstill.storage.files.paths import LocalFolder
from tests.storage.stores import same_targets, write_targets, write_tokens


@pytest.fixture
def counted(monkeypatch):
    reads = []
    real = LocalFolder.read_range

    def counting(self, name, offset, length):
        if name.startswith("units/"):  # the index is read in blocks of its own, and not cached on disk
            reads.append(name)
        return real(self, name, offset, length)

    monkeypatch.setattr(LocalFolder, "read_range", counting)
    return reads


def test_second_reading_comes_from_the_cache_and_damage_is_read_again(tmp_path, counted):
    tokens = write_tokens(tmp_path / "t", 8, rows_per_unit=1)
    plain = write_targets(tmp_path / "d", tokens, rows_per_unit=1)
    wanted = [plain.row(r).targets for r in range(8)]
    cache = tmp_path / "cache"
    for expected_reads in (8, 0):
        reader = StoreReader(tmp_path / "d", cache_dir=cache)
        counted.clear()
        assert all(same_targets(reader.row(r).targets, wanted[r]) for r in range(8))
        assert len(counted) == expected_reads
    entry = sorted(cache.iterdir())[0]
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 1
    entry.write_bytes(data)
    assert all(same_targets(reader.row(r).targets, wanted[r]) for r in range(8)) and len(counted) == 1
    counted.clear()
    assert reader.row(0).row == 0 and counted == []


def test_size_is_bounded_and_the_oldest_goes_first(tmp_path):
    cache = NodeCache(tmp_path / "c", max_bytes=1000)
    for number in range(20):
        cache.put(f"k{number}", bytes(100))
        os.utime(tmp_path / "c" / f"k{number}.batch", (number, number))
        assert sum(p.stat().st_size for p in (tmp_path / "c").iterdir()) <= 1000
    assert cache.get("k0") is None and cache.get("k19") == bytes(100)
    assert NodeCache(tmp_path / "c", max_bytes=1000).get("k19") == bytes(100)


def test_a_full_disk_only_stops_the_caching(tmp_path, monkeypatch):
    tokens = write_tokens(tmp_path / "t", 2)
    reader = StoreReader(tmp_path / "t", cache_dir=tmp_path / "c")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("potstill.storage.files.node_cache.os.rename", full)
    assert (reader.row(1).tokens == tokens.row(1).tokens).all()
    assert list((tmp_path / "c").iterdir()) == []


def test_reading_does_not_import_torch(tmp_path):
    import subprocess

    write_tokens(tmp_path / "t", 4)
    code = (
        "import sys; from potstill.storage import *; t = StoreReader(sys.argv[1]);"
        "l = Loader(EpochPlan(4, global_batch=2, seed=0), t, {}); next(l); l.close(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "t")], check=True, timeout=60)
