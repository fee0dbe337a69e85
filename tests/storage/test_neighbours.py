"""Record batches that follow one another come in one request from an object store, and checked one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.storage import CorruptError, RunSpec, StoreReader, StoreWriter, TokensRow, seal_store
from potstill.storage.store.neighbours import MAX_RUN_BYTES, runs_of_neighbours

ROWS, LENGTH = 12, 4096


@pytest.fixture
def reader(tmp_path: Path) -> StoreReader:
    """A store of two units whose record batches hold two rows each, behind the client for object stores."""
    rng = np.random.default_rng(0)
    spec = RunSpec(
        kind="tokens",
        row_length=LENGTH,
        rows_per_unit=6,
        num_rows=None,
        vocab_size=50_000,
        tokenizer_digest="made by a test",
    )
    writer = StoreWriter.create(tmp_path / "store", spec)
    for unit in range(2):
        numbers = writer.unit_rows(unit)
        docs = np.array([LENGTH], np.int32)
        rows = [TokensRow(n, rng.integers(0, 50_000, LENGTH).astype(np.int32), docs) for n in numbers]
        writer.commit_unit(unit, rows)
    seal_store(tmp_path / "store")
    return StoreReader(f"file://{tmp_path / 'store'}")


@pytest.fixture
def reads(reader: StoreReader, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(name, bytes) of each range that is read."""
    found: list[tuple[str, int]] = []
    folder: Any = reader._folder
    read_range = folder.read_range

    def counting(name: str, offset: int, length: int) -> bytes:
        found.append((name, length))
        data: bytes = read_range(name, offset, length)
        return data

    monkeypatch.setattr(folder, "read_range", counting)
    return found


def of_units(reads: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [read for read in reads if read[0].startswith("units/")]


def test_a_unit_is_read_by_one_request(reader: StoreReader, reads: list[tuple[str, int]], tmp_path: Path) -> None:
    local = StoreReader(tmp_path / "store")
    rows = reader.tokens_rows(range(ROWS))
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(rows, local.tokens_rows(range(ROWS)), strict=True))
    assert len(of_units(reads)) == 2  # one of each unit, for six batches
    assert sum(length for _, length in of_units(reads)) == reader.read_bytes(range(ROWS))
    reads.clear()
    reader.rows([0, 11])
    assert len(of_units(reads)) == 2  # nothing between them is read


def test_bytes_that_came_damaged_are_read_again_alone(
    reader: StoreReader, reads: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reader.tokens_rows(range(6))
    folder: Any = reader._folder
    read_range = folder.read_range

    def damaged(name: str, offset: int, length: int) -> bytes:
        data = bytearray(read_range(name, offset, length))
        if len(reads) == 1:
            data[10] ^= 1
        return bytes(data)

    monkeypatch.setattr(folder, "read_range", damaged)
    reads.clear()
    found = reader.tokens_rows(range(6))
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(found, expected, strict=True))
    assert [length < MAX_RUN_BYTES for _, length in reads] == [True, True] and reads[0][1] > 2 * reads[1][1]


def test_a_file_that_is_cut_names_the_row(reader: StoreReader, tmp_path: Path) -> None:
    (path, _) = sorted((tmp_path / "store" / "units").glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:-30_000])
    assert len(reader.rows([0, 1])) == 2
    with pytest.raises(CorruptError, match="truncated"):
        reader.rows(range(6))


def test_runs_end_at_gaps_units_and_their_size() -> None:
    def entry(unit: int, offset: int, length: int) -> dict[str, int]:
        return {"unit": unit, "offset": offset, "length": length}

    half = MAX_RUN_BYTES // 2
    entries = [entry(0, 8, 10), entry(0, 18, 10), entry(0, 18, 10), entry(0, 40, 5), entry(1, 45, 5), entry(1, 50, 5)]
    assert list(runs_of_neighbours(entries)) == [(0, [(8, 10), (18, 10)]), (1, [(45, 5), (50, 5)])]
    large = [entry(0, n * half, half) for n in range(5)]
    assert [len(spans) for _, spans in runs_of_neighbours(large)] == [2, 2]
    assert list(runs_of_neighbours(entries, without={(0, 8), (1, 50)})) == []
