"""index.arrow is read, not mapped: cut or changed under a reader it is an error; what is used is what was checked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from potstill.storage import CorruptError
from potstill.storage.files.paths import LocalFolder
from potstill.storage.store import index
from potstill.storage.store.index import COLUMNS, RowIndex, StatColumns, encode_index
from tests.storage.stores import write_targets, write_tokens

NUM_ROWS = 5 * 1024 + 77
ROOT = Path(__file__).parents[2]
# Opens the store, then waits until its index is cut, as a copy over it or a full disk cuts it.
LATE_READ = """
import sys
from potstill.common.entry_point import run_command
from potstill.storage import StoreReader
reader = StoreReader(sys.argv[1])
reader.row(0)
print("ready", flush=True)
sys.stdin.readline()
sys.exit(run_command(lambda: len(reader.row_stats["mean_loss"]) * 0, program="late", show_traceback=False))
"""


@pytest.fixture
def made(tmp_path):
    """An index of six blocks on disk, and its columns."""
    rng = np.random.default_rng(0)
    columns = {name: rng.integers(0, 1 << 20, NUM_ROWS).astype(dtype) for name, dtype in COLUMNS}
    columns["stat.loss"] = rng.random(NUM_ROWS).astype(np.float32)
    data, blocks = encode_index(columns, "fingerprint")
    (tmp_path / "index.arrow").write_bytes(data)
    return tmp_path / "index.arrow", columns, blocks


def opened(path, blocks, **changes):
    values = {"num_rows": NUM_ROWS, "num_bytes": path.stat().st_size, "blocks": blocks, "rows_per_block": 1024}
    return RowIndex(LocalFolder(path.parent), path.name, stats=["loss"], **(values | changes))


@pytest.fixture
def reads(monkeypatch):
    seen, real = [], LocalFolder.read_range
    monkeypatch.setattr(LocalFolder, "read_range", lambda self, *args: seen.append(args[2]) or real(self, *args))
    return seen


@pytest.mark.parametrize("read_bytes", [1, 100_000, 4 << 20])
def test_a_column_is_read_in_few_bounded_reads(made, reads, monkeypatch, read_bytes):
    path, columns, blocks = made
    monkeypatch.setattr(index, "COLUMN_READ_BYTES", read_bytes)
    for name, values in columns.items():
        found = opened(path, blocks).column(name)
        assert found.dtype == values.dtype and np.array_equal(found, values)
    longest = max(block.length for block in blocks)
    assert max(reads) <= max(longest, read_bytes)
    assert len(reads) == len(columns) * {1: 6, 100_000: 3, 4 << 20: 1}[read_bytes]


def test_blocks_in_any_order_of_the_file_are_read(made):
    """Of a store that another writer has sealed: the manifest says where each block lies."""
    path, columns, blocks = made
    data = path.read_bytes()
    order = [4, 0, 2, 1, 3, 5]
    path.write_bytes(b"".join(data[blocks[i].offset : blocks[i].offset + blocks[i].length] for i in order))
    places = dict(zip(order, np.cumsum([0, *(blocks[i].length for i in order)])[:-1].tolist(), strict=True))
    moved = [block._replace(offset=places[i]) for i, block in enumerate(blocks)]
    found = opened(path, moved)
    assert np.array_equal(found.column("stat.loss"), columns["stat.loss"])
    assert found.block(2)["unit"].tolist() == columns["unit"][2048:3072].tolist()


def test_blocks_are_kept_up_to_a_bound(made, reads, monkeypatch):
    path, columns, blocks = made
    monkeypatch.setattr(index, "CACHE_BYTES", 2 * blocks[0].length)
    found = opened(path, blocks)
    for number in (0, 1, 0, 2, 0, 1):
        assert np.array_equal(found.block(number)["offset"], columns["offset"][number * 1024 : (number + 1) * 1024])
    assert len(reads) == 4  # 0, 1, 2 and 1 again
    empty = {name: values[:0] for name, values in columns.items()}
    data, none = encode_index(empty, "fingerprint")
    path.write_bytes(data)
    assert opened(path, none, num_rows=0).column("stat.loss").shape == (0,)


def test_an_index_that_is_cut_or_changed_under_a_reader_is_an_error(made):
    path, _, blocks = made
    data = path.read_bytes()
    for length in (0, 100, blocks[3].offset + 5, len(data) // 2, blocks[5].offset + blocks[5].length - 1):
        path.write_bytes(data)
        found = opened(path, blocks)
        os.truncate(path, length)
        with pytest.raises(CorruptError, match=rf"index\.arrow: {length} bytes, expected at least \d+ \(truncated"):
            found.column("stat.loss")
        with pytest.raises(CorruptError, match="truncated file"):
            found.block(5)
    for place in range(blocks[0].offset, blocks[2].offset, 997):
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        with pytest.raises(CorruptError, match=r"index\.arrow, rows from (0|1024): block does not fit its crc32"):
            StatColumns(opened(path, blocks), ["loss"])["loss"]


def test_statistics_under_live_damage_are_right_or_an_error(made):
    """A reader whose file changes all the time: each block that it gives is the one that it has checked."""
    path, columns, blocks = made
    data = path.read_bytes()
    stop = threading.Event()

    def damage():
        rng = np.random.default_rng(1)
        with path.open("r+b", buffering=0) as file:
            while not stop.is_set():
                place = int(rng.integers(blocks[0].offset, blocks[5].offset))
                for byte in (data[place] ^ 1, data[place]):
                    file.seek(place)
                    file.write(bytes([byte]))

    thread = threading.Thread(target=damage)
    thread.start()
    outcomes = {"right": 0, "noticed": 0}
    try:
        for turn in range(300):
            try:
                found = opened(path, blocks).block(turn % 6)["stat.loss"]
            except CorruptError:
                outcomes["noticed"] += 1
                continue
            first = turn % 6 * 1024
            assert np.array_equal(found, columns["stat.loss"][first : first + 1024])
            outcomes["right"] += 1
    finally:
        stop.set()
        thread.join()
    assert outcomes["right"] > 0


def test_a_process_whose_index_is_cut_ends_with_a_message_and_not_with_a_signal(tmp_path):
    store = Path(write_targets(tmp_path / "d", write_tokens(tmp_path / "t", 8)).url)
    process = subprocess.Popen(
        [sys.executable, "-c", LATE_READ, str(store)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    try:
        assert process.stdout.readline() == "ready\n"
        os.truncate(store / "index.arrow", 0)
        _, log = process.communicate("\n", timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1 and "Traceback" not in log
    assert f"late: error: {store}/index.arrow: 0 bytes, expected at least" in log


def test_nothing_of_a_store_is_mapped():
    """A file that is cut while it is mapped ends the process with SIGBUS, which no code can turn into an error.

    What is mapped are files of a private folder of the node, which nobody changes in place.
    """
    found = [path for path in (ROOT / "storage").rglob("*.py") if re.search(r"mmap|memory_?map", path.read_text())]
    assert [path.name for path in found] == ["shared_arrays.py"]
