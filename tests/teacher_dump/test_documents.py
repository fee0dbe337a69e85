"""Files in, documents out: every format gives the same texts, places let a reader go on, broken records are named."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from potstill.common.errors import UserError
from potstill.teacher_dump.documents import DocumentReader, Place
from potstill.teacher_dump.inputs import digest_files, find_files
from potstill.teacher_dump.records.text import PlainText
from tests.teacher_dump.tiny import some_texts, write_jsonl

TEXTS = some_texts(50)


def read(*entries: object, limit: int = 0, start: Place | None = None, field: str = "text") -> DocumentReader:
    files = find_files([str(entry) for entry in entries])
    return DocumentReader(files, kind=PlainText(field), max_bad_lines=limit, start=start)


def texts_of(*entries: object, **options: object) -> list[str]:
    return [document.record.text for document in read(*entries, **options)]  # type: ignore[arg-type]


def _zst_frames(data: bytes) -> bytes:
    """Two frames, as a writer leaves that flushes: a reader that stops after the first loses half."""
    half = data.index(b"\n", len(data) // 2) + 1
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": _zst_frames,
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_jsonl_is_read_with_each_compression(tmp_path: Path, suffix: str) -> None:
    plain = write_jsonl(tmp_path / "plain.jsonl", TEXTS)
    path = tmp_path / f"other.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](plain.read_bytes()))
    assert texts_of(path) == TEXTS


@pytest.mark.parametrize("row_group_size", [7, 1000])
def test_parquet_is_read_from_any_row(tmp_path: Path, row_group_size: int) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": TEXTS, "n": range(50)}), path, row_group_size=row_group_size)
    assert texts_of(path, field="body") == TEXTS
    for start in (0, 6, 7, 8, 49, 50):
        assert texts_of(path, field="body", start=Place(0, start)) == TEXTS[start:]


@pytest.mark.parametrize("start", [0, 1, 25, 49, 50])
def test_a_reader_goes_on_at_a_place(tmp_path: Path, start: int) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", TEXTS[:25])
    second = tmp_path / "b.jsonl.xz"
    second.write_bytes(lzma.compress(write_jsonl(tmp_path / "b.plain", TEXTS[25:]).read_bytes()))
    whole = list(read(first, second))
    at = whole[start].place if start < 50 else Place(2, 0)
    reader = read(first, second, start=at)
    assert list(reader) == whole[start:]
    assert reader.bytes_read == first.stat().st_size + second.stat().st_size


def test_folders_and_globs_have_one_order(tmp_path: Path) -> None:
    for name in ("b/z.txt", "b/a.txt", "a/m.txt", "a/.hidden/x.txt", "a/read.me"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert texts_of(tmp_path) == ["a/m.txt", "b/a.txt", "b/z.txt"]
    assert texts_of(tmp_path / "b/*.txt", tmp_path) == ["b/a.txt", "b/z.txt", "a/m.txt"]
    assert texts_of(tmp_path / "**/*.me") == ["a/read.me"]  # other kinds by name or glob: one text per file


def test_the_digest_sees_names_content_and_order_but_no_absolute_place(tmp_path: Path) -> None:
    def corpus(root: str, second: str = "two") -> Path:
        folder = tmp_path / root
        folder.mkdir()
        (folder / "a.txt").write_text("one")
        (folder / "b.txt").write_text(second)
        return folder

    here, moved, changed = corpus("here"), corpus("moved"), corpus("changed", "owt")
    digest = digest_files(find_files([str(here)]))
    assert digest == digest_files(find_files([str(moved)]))
    assert digest == digest_files(find_files([f"{moved}/*.txt"]))
    assert digest != digest_files(find_files([str(changed)]))
    assert digest != digest_files(find_files([str(here / "b.txt"), str(here / "a.txt")]))


def test_broken_lines_are_counted_and_skipped_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "one"}\n{"text": \n\n["no", "object"]\n{"text": 7}\n{"text": "\xff"}\n{"text": "two"}\n'
    )
    reader = read(path, limit=4)
    assert [(d.record.text, d.bad_lines) for d in reader] == [("one", 0), ("two", 4)]
    assert reader.bad_lines == 4
    with pytest.raises(UserError, match=rf"{path}, line 5: field 'text' is int.*broken record 3, 2 may be skipped"):
        texts_of(path, limit=2)
    with pytest.raises(UserError, match=r"line 2: not valid JSON"):
        texts_of(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"txt": "x", "id": 1}\n', r"line 1: no field 'text'; found \['id', 'txt'\]"),
        ("a.txt", b"caf\xe9", r"not UTF-8 at byte 3 \(0xe9\)"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000)[:-20], r"cannot be read to its end"),
        ("a.jsonl.gz", b"not gzip at all", r"cannot be read to its end"),
        ("a.jsonl.zst", b"not zstd at all", r"cannot be read to its end.*damaged .zst"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "x"}\n' * 1000)[:-20], r"cannot be read to its end"),
        ("a.parquet", b"not parquet", r"not a readable Parquet"),
        ("a.jsonl", json.dumps({"text": "\ud800"}).encode(), r"half of a surrogate pair"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        texts_of(path)
    assert str(path) in str(caught.value)


def test_parquet_without_the_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": TEXTS}), path)
    with pytest.raises(UserError, match=r"no column 'text'; found \['body'\]"):
        texts_of(path)


def test_missing_input_is_named(tmp_path: Path) -> None:
    for entry in (tmp_path / "nothing", tmp_path / "*.jsonl"):
        with pytest.raises(UserError, match="no such file or folder"):
            find_files([str(entry)])
    with pytest.raises(UserError, match=r"holds no .*\.jsonl"):
        find_files([str(tmp_path)])
