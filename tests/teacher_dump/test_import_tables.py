"""Parquet and Arrow files as both doors find and read them: any kind from any record on, damage, names of files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from potstill.common.errors import UserError
from potstill.teacher_dump.importing.globs import expanded
from potstill.teacher_dump.importing.tables.files import find_tables, first_columns
from potstill.teacher_dump.importing.tables.reading import count_records, read_batches, read_records, read_schema

ROWS = 23
TABLE = pa.table({"ids": [[row] * (row % 5) for row in range(ROWS)], "other": list(range(ROWS))})


def parquet(path: Path, table: pa.Table = TABLE) -> None:
    pq.write_table(table, path, row_group_size=7)


def arrow_file(path: Path, table: pa.Table = TABLE) -> None:
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def arrow_stream(path: Path, table: pa.Table = TABLE) -> None:
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


KINDS: dict[str, Callable[..., None]] = {"parquet": parquet, "file": arrow_file, "stream": arrow_stream}


@pytest.mark.parametrize("kind", KINDS)
def test_records_from_any_place(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.table"  # first bytes say what it is, not the name
    KINDS[kind](path)
    assert read_schema(path).names == ["ids", "other"] and count_records(path) == ROWS
    whole = TABLE["ids"].to_pylist()
    for start in range(ROWS + 2):
        found = list(read_records(path, ["ids"], start=start, at_once=3))
        assert [(one.number, one.values["ids"].as_py()) for one in found] == list(enumerate(whole))[start:]
        batches = list(read_batches(path, ["ids"], start=start, at_once=3))
        assert all(batch.first + batch.values.num_rows > start for batch in batches)
        shares = [batch.share for batch in batches]
        assert shares == sorted(shares) and all(0 < share <= 1 for share in shares)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_damaged_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.table"
    KINDS[kind](path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.table (cannot be read to its end|is not a readable)"):
        list(read_records(path, read_schema(path).names, start=0, at_once=3))
    KINDS[kind](path, pa.table([[1], [2]], names=["ids", "ids"]))
    with pytest.raises(UserError, match=r"two columns of one name among \['ids', 'ids'\]"):
        read_schema(path)
    with pytest.raises(UserError, match=r"none\.table cannot be read: .*No such file"):
        count_records(tmp_path / "none.table")


def test_a_folder_is_searched_as_its_writer_left_it(tmp_path: Path) -> None:
    saved = tmp_path / "in" / "b" / "saved"
    saved.mkdir(parents=True)
    for name in ("z.arrow", "a.arrow", "cache-1.arrow"):
        arrow_stream(saved / name)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "z.arrow"}, {"filename": "a.arrow"}]}))
    for name in ("c.parquet", ".hidden.parquet", "a.parquet"):
        parquet(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no table")
    found = find_tables([str(tmp_path / "in")])
    assert [file.name for file in found] == ["a.parquet", "b/saved/z.arrow", "b/saved/a.arrow", "c.parquet"]
    again = find_tables([str(tmp_path / "in"), str(tmp_path / "in" / "*.parquet")])
    assert [file.path for file in again] == [file.path for file in found]  # named twice, read once
    assert first_columns([str(tmp_path / "in")]) == ["ids", "other"]
    assert first_columns([str(tmp_path / "in" / "notes.txt")]) == []
    (saved / "a.arrow").unlink()
    with pytest.raises(UserError, match=r"its file .*a\.arrow does not exist"):
        find_tables([str(tmp_path / "in")])


def test_a_name_with_signs_of_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "run[1]").mkdir()
    parquet(tmp_path / "run[1]" / "a.parquet")
    entry = str(tmp_path / "run[1]")
    assert expanded([entry]) == [entry] and len(find_tables([entry])) == 1
    assert expanded([str(tmp_path / "run*")]) == [entry]
    with pytest.raises(UserError, match=r"run\[2\].*no file matches it"):
        expanded([str(tmp_path / "run[2]")])
