"""Each format of tokens: what its writers put into a file comes out, from any record on; what is damaged is said."""

from __future__ import annotations

import gzip
import importlib
import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.common.errors import UserError
from potstill.teacher_dump.importing.token_file import Reading, TokenFile
from potstill.teacher_dump.importing.token_formats import TOKEN_FORMATS
from potstill.teacher_dump.importing.token_search import find_token_files
from potstill.teacher_dump.importing.token_source import PARTS, TokenDocument, TokenSource
from tests.teacher_dump import token_files as made
from tests.teacher_dump.token_files import END, VOCAB, Documents, joined, some_documents

DOCUMENTS = [[5, 7, END], [9, END], [11, 12, 13, 14, END], [END], [299, END]]


def opened(path: Path, **reading: Any) -> TokenFile:
    (found,) = find_token_files([str(path)], None)
    options = {"vocab_size": VOCAB, "end_token": END} | reading
    return importlib.import_module(TOKEN_FORMATS[found.format].module).open_file(found.path, Reading(**options))


def source(*paths: Path, longest: int | None = None, bad: int = 0, **reading: Any) -> TokenSource:
    options = {"vocab_size": VOCAB, "end_token": END} | reading
    found = find_token_files([str(path) for path in paths], None)
    return TokenSource(found, Reading(**options), longest=longest, max_bad_lines=bad)


def read(*paths: Path, **options: Any) -> list[TokenDocument]:
    return list(source(*paths, **options).read())


def ids_of(documents: list[TokenDocument]) -> Documents:
    return [document.ids.tolist() for document in documents]


def lists(documents: Documents) -> dict[str, Any]:
    return {"input_ids": documents, "text": ["t"] * len(documents)}


WRITERS: dict[str, Callable[[Path, Documents], Path]] = {
    **{f"megatron {t}": lambda p, d, t=t: made.megatron(p / "a", d, t) for t in ("<u2", "<i4", "<i8", "<i2")},
    "megatron of two sequences": lambda p, d: made.megatron(p / "a", d, sequences=2),
    "megatron with modes": lambda p, d: made.megatron(p / "a", d, modes=bytes(len(d))),
    "ids": lambda p, d: made.write_ids(p / "a.bin", d),
    "ids in .npy": lambda p, d: made.write_ids(p / "a.npy", d),
    "numpy": lambda p, d: made.numpy_array(p / "a.npy", np.array(joined(d), "<i4")),
    "numpy, big-endian": lambda p, d: made.numpy_array(p / "a.npy", np.array(joined(d), ">u4")),
    "llm.c": lambda p, d: made.llmc(p / "a.bin", d),
    "olmo": lambda p, d: made.csv_bounds(p / "a.csv.gz", d) and made.write_ids(p / "a.npy", d),
    "dolma": lambda p, d: made.csv_bounds(p / "a.csv.gz", d, more=",id,p.gz,3") and made.write_ids(p / "a.npy", d),
    "datatrove": lambda p, d: made.datatrove(p / "a.ds", d),
    "parquet": lambda p, d: made.parquet(p / "a.parquet", lists(d), group=2),
    "large lists": lambda p, d: made.parquet(p / "a.parquet", {"tokens": pa.array(d, pa.large_list(pa.uint16()))}),
    "arrow file": lambda p, d: made.arrow_file(p / "a.arrow", lists(d), batch=2),
    "arrow stream": lambda p, d: made.arrow_stream(p / "a.arrow", lists(d), batch=2),
    "save_to_disk": lambda p, d: made.saved_to_disk(p / "a", [lists(d[:2]), lists(d[2:])]),
    "json lines": lambda p, d: json_lines(p / "a.jsonl", d),
    "json lines, gzip": lambda p, d: json_lines(p / "a.jsonl.gz", d),
}


def json_lines(path: Path, documents: Documents) -> Path:
    text = "".join(json.dumps({"input_ids": document}) + "\n" for document in documents).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_holds_what_was_written_from_any_record_on(name: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path, DOCUMENTS)
    whole = read(path)
    assert ids_of(whole) == DOCUMENTS
    assert all(document.mask is None for document in whole)
    assert [document.place for document in whole] == sorted({document.place for document in whole})
    for number, document in enumerate(whole):
        again = list(source(path).read(start=document.place))
        assert ids_of(again) == DOCUMENTS[number:]
        assert [one.place for one in again] == [one.place for one in whole[number:]]


def test_the_ids_of_a_flat_file_are_views_of_it(tmp_path: Path) -> None:
    (document, *_) = read(made.megatron(tmp_path / "a", DOCUMENTS))
    base: Any = document.ids
    while isinstance(base, np.ndarray):
        base = base.base
    assert document.ids.dtype == np.uint16 and isinstance(base, mmap.mmap)


def test_many_documents_come_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from potstill.teacher_dump.importing import bounds, megatron

    for module in (bounds, megatron):
        monkeypatch.setattr(module, "_BLOCK_DOCUMENTS", 7)
    monkeypatch.setattr(bounds, "_BLOCK_TOKENS", 64)
    monkeypatch.setattr(megatron, "_BLOCK_SEQUENCES", 5)
    documents = some_documents(40)
    for name in ("megatron <u2", "megatron of two sequences", "ids", "olmo", "datatrove"):
        (tmp_path / name).mkdir()
        path = WRITERS[name](tmp_path / name, documents)
        for skip in (0, 6, 7, 8, 39, 40):
            found = [record.ids.tolist() for record in opened(path).records(skip)]  # type: ignore[union-attr]
            assert found == documents[skip:], (name, skip)


@pytest.mark.parametrize(
    ("bounds", "end", "expected"),
    [
        ("auto", END, DOCUMENTS),
        ("end_token", 12, [[5, 7, END, 9, END, 11, 12], [13, 14, END, END, 299, END]]),
        ("none", END, [joined(DOCUMENTS)]),
        ("auto", None, [joined(DOCUMENTS)]),
    ],
)
def test_bounds_of_a_file_that_records_none(bounds: str, end: int | None, expected: Documents, tmp_path: Path) -> None:
    opened_source = source(made.write_ids(tmp_path / "a.bin", DOCUMENTS), bounds=bounds, end_token=end)
    assert ids_of(list(opened_source.read())) == expected
    notes = ["nothing says where documents end: each file is read as one document"] if end is None else []
    assert opened_source.notes == notes
    with pytest.raises(UserError, match="nothing beside it says where documents end"):
        source(tmp_path / "a.bin", bounds="recorded")


def test_what_follows_the_last_end_token_is_a_document(tmp_path: Path) -> None:
    assert ids_of(read(made.write_ids(tmp_path / "a.bin", [[5, END], [6, 7]]))) == [[5, END], [6, 7]]


def test_an_end_token_that_never_occurs_is_told(tmp_path: Path) -> None:
    path = made.write_ids(tmp_path / "a.bin", DOCUMENTS)
    opened_source = source(path, end_token=200)
    assert ids_of(list(opened_source.read())) == [joined(DOCUMENTS)]
    assert "its end token 200 never occurs" in opened_source.notes[0]


def test_a_loss_mask_of_datatrove_is_the_mask(tmp_path: Path) -> None:
    loss = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 1]
    documents = read(made.datatrove(tmp_path / "a.ds", DOCUMENTS, loss=loss))
    assert (
        [one.mask.tolist() for one in documents]
        == [  # type: ignore[union-attr]
            [bool(on) for on in part] for part in (loss[:3], loss[3:5], loss[5:10], loss[10:11], loss[11:])
        ]
    )
    loss[4] = 7
    with pytest.raises(UserError, match=r"document 2: the loss mask of token 1 is 7, expected 0 or 1"):
        read(made.datatrove(tmp_path / "b.ds", DOCUMENTS, loss=loss))


TABLE = {"input_ids": [[5, 6, 7, 8], [9, 10, 11, 12]]}


@pytest.mark.parametrize("writer", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("loss_mask", [[0, 0, 1, 1], [1, 0, 1, 0]], [[False, False, True, True], [True, False, True, False]]),
        ("keep", [[False, True, True, True]] * 2, [[False, True, True, True]] * 2),
        ("labels", [[-100, -100, 7, 8], [9, -100, -100, -100]], [[False] * 2 + [True] * 2, [True] + [False] * 3]),
    ],
)
def test_a_column_says_what_is_trained_on(
    writer: str, column: str, values: list[list[Any]], expected: list[list[bool]], tmp_path: Path
) -> None:
    path = table(tmp_path, writer, {**TABLE, column: values})
    documents = read(path, mask_column=column)
    assert [document.mask.tolist() for document in documents] == expected  # type: ignore[union-attr]
    assert ids_of(documents) == TABLE["input_ids"]
    told = source(path).notes
    assert any(f"column {column} is not used" in note for note in told) == (column != "keep")


def table(folder: Path, writer: str, columns: dict[str, Any]) -> Path:
    if writer == "parquet":
        return made.parquet(folder / "a.parquet", columns)
    path = folder / "a.jsonl"
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("writer", ["parquet", "jsonl"])
def test_zeros_of_an_attention_mask_are_padding_and_its_numbers_documents(writer: str, tmp_path: Path) -> None:
    ids = [[5, 6, 7, 8, 0, 0], [0, 9, 10, 11, 12, 0], [1, 2, 0, 0, 3, 4], [0] * 6]
    attention = [[1, 1, 2, 2, 0, 0], [0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1], [0] * 6]
    path = table(tmp_path, writer, {"input_ids": ids, "attention_mask": attention, "m": [[0, 1, 0, 1, 1, 1]] * 4})
    documents = read(path, mask_column="m")
    assert ids_of(documents) == [[5, 6], [7, 8], [9, 10, 11, 12], [1, 2], [3, 4], []]
    assert [document.place.record for document in documents] == [
        0, 1, PARTS, 2 * PARTS, 2 * PARTS + 1, 3 * PARTS
    ]  # fmt: skip
    assert documents[2].mask is not None and documents[2].mask.tolist() == [True, False, True, True]
    assert ids_of(read(path, bounds="none")) == [[5, 6, 7, 8], [9, 10, 11, 12], [1, 2, 3, 4], []]
    again = list(source(path).read(start=documents[1].place))
    assert ids_of(again)[1:] == ids_of(documents)[1:], "a record is read again from its first document on"


def test_end_tokens_part_the_documents_of_a_record(tmp_path: Path) -> None:
    path = made.parquet(tmp_path / "a.parquet", {"input_ids": [[5, END, 6, 7, END], [END], [8, 9]]})
    assert ids_of(read(path, bounds="end_token")) == [[5, END], [6, 7, END], [END], [8, 9]]
    assert ids_of(read(path)) == [[5, END, 6, 7, END], [END], [8, 9]]
    lists_of = read(path, bounds="end_token", longest=8)
    assert [one.together.tolist() for one in lists_of[:2]] == [[5, END, 6, 7, END]] * 2, "a row is on one side"


def test_rows_of_a_two_dimensional_array_are_records(tmp_path: Path) -> None:
    path = made.numpy_array(tmp_path / "a.npy", np.array([[5, END, 6], [7, 8, END]], "<u2"))
    assert ids_of(read(path)) == [[5, END, 6], [7, 8, END]]
    assert ids_of(read(path, bounds="end_token")) == [[5, END], [6], [7, 8, END]]
    with pytest.raises(UserError, match="says that its ids are uint16, and --dtype is uint32; leave it out"):
        read(path, dtype="uint32")


def test_an_index_may_be_left_aside(tmp_path: Path) -> None:
    path = made.megatron(tmp_path / "a", DOCUMENTS)
    assert ids_of(read(path, bounds="none")) == [joined(DOCUMENTS)]
    assert ids_of(read(path, bounds="end_token", end_token=12)) == [joined(DOCUMENTS)[:7], joined(DOCUMENTS)[7:]]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"input_ids": [[5, 300]]}, "token 1 is 300, expected an id below 300"),
        ({"input_ids": [[5, -1]]}, "token 1 is -1, expected an id below 300"),
        ({"input_ids": [None]}, "column 'input_ids' is"),
        ({"input_ids": [[5, None]]}, "column 'input_ids' "),
        ({"input_ids": [[5, 6]], "m": [[1]]}, "column 'm' has 1 values, 'input_ids' 2"),
        ({"input_ids": [[5, 6]], "m": [[1, 2]]}, "column 'm' is 2 at token 1, expected 0 or 1"),
        ({"input_ids": [[5, 6]], "m": [None]}, "column 'm' is"),
        ({"input_ids": [[5, 6]], "label": [[6, -100]]}, r"column 'label' is 6 at token 0, expected -100 or the id 5"),
        ({"input_ids": [[5] * 9]}, "a row of 9 tokens, where row_length is 8"),
    ],
)
@pytest.mark.parametrize("writer", ["parquet", "jsonl"])
def test_a_bad_record_is_named_and_counted(writer: str, columns: dict[str, Any], reason: str, tmp_path: Path) -> None:
    good = {name: [[7, 8] if name != "m" else [1, 1]] for name in columns} | (
        {"label": [[7, 8]]} if "label" in columns else {}
    )
    both = {name: [good[name][0], values[0], good[name][0]] for name, values in columns.items()}
    path = table(tmp_path, writer, both)
    options: dict[str, Any] = {"longest": 8, "mask_column": next((n for n in columns if n in ("m", "label")), None)}
    with pytest.raises(UserError, match=rf"(row|line) 2: .*{reason}"):
        read(path, **options)
    reader = source(path, bad=1, **options).read()
    assert ids_of(list(reader)) == [[7, 8], [7, 8]]
    assert reader.bad_lines == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ("{}", "is missing, expected a list"),
        ('{"input_ids": [1.0]}', "holds float, expected integers only"),
        ('{"input_ids": [true]}', "holds bool, expected integers only"),
        ('{"input_ids": [[1]]}', "holds list, expected integers only"),
        ('{"input_ids": [99999999999999999999]}', "more than 63 bits"),
    ],
)
def test_a_bad_line_is_named(line: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"input_ids": [5]}\n' + line + "\n")
    with pytest.raises(UserError, match=f"line 3: .*{reason}"):
        read(tmp_path / "a.jsonl")


def change(path: Path, at: int, new: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(new)] = new
    path.write_bytes(bytes(data))


def cut(path: Path, count: int = 1) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def append(path: Path, more: bytes = b"\0") -> None:
    path.write_bytes(path.read_bytes() + more)


def test_a_damaged_megatron_set_is_refused(tmp_path: Path) -> None:
    index, data = tmp_path / "a.idx", tmp_path / "a.bin"
    lengths, places, bounds = 34, 34 + 4 * 5, 34 + 12 * 5
    trouble: list[tuple[Callable[[], None], str]] = [
        (lambda: change(index, 0, b"XX"), "expected the index b'MMIDIDX"),
        (lambda: index.write_bytes(b"TNTIDX\x00\x00" + bytes(40)), "old cached or lazy kind"),
        (lambda: change(index, 9, b"\x02"), "has version 2"),
        (lambda: change(index, 17, b"\x06"), "holds float64"),
        (lambda: change(index, 17, b"\x07"), "holds float32"),
        (lambda: change(index, 17, b"\x09"), "code 9 of the type"),
        (lambda: change(index, 17, b"\x04"), "take bytes 0 to 26|cut off, or"),
        (lambda: cut(index), "cut off or damaged"),
        (lambda: append(index), "cut off or damaged"),
        (lambda: append(index, bytes([0, 1, 0, 0, 0])), "sequence 1 has mode 1"),
        (lambda: index.write_bytes(index.read_bytes()[:20]), "expected the index"),
        (lambda: cut(data), "no whole number of ids"),
        (lambda: cut(data, 2), "take bytes 0 to 26 of the .bin, which has 24"),
        (lambda: append(data, b"\0\0"), "which has 28"),
        (lambda: change(index, lengths, b"\x02"), "sequence 0 has 2 tokens|sequence 1 has"),
        (lambda: change(index, lengths, b"\xff\xff\xff\xff"), "sequence 0 has -1 tokens"),
        (lambda: change(index, places + 8, b"\x04"), "sequence 1 has 2 tokens from byte 4 on"),
        (lambda: change(index, bounds + 8, b"\x06"), "document bound 1 is 6, expected 0 to 5"),
        (lambda: change(index, bounds + 16, b"\x00"), "document bound 2 is 0, expected 1 to 5"),
        (lambda: change(index, bounds, b"\x01"), "document bounds go from 1 to 5"),
        (lambda: data.unlink(), "a Megatron data set is a .bin and an .idx"),
    ]
    for harm, message in trouble:
        made.megatron(tmp_path / "a", DOCUMENTS)
        harm()
        with pytest.raises(UserError, match=message):
            read(index)


@pytest.mark.parametrize("entry", [1, 2, 3])
def test_an_end_that_falls_is_found_at_the_edge_of_a_block(
    entry: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill.teacher_dump.importing import bounds

    monkeypatch.setattr(bounds, "_BLOCK_DOCUMENTS", 2)
    made.datatrove(tmp_path / "a.ds", DOCUMENTS)
    change(tmp_path / "a.ds.index", 8 * entry, b"\x02")
    before = np.cumsum([len(document) for document in DOCUMENTS])[entry - 1]
    with pytest.raises(UserError, match=f"end {entry} is 2, expected {before} to 13"):
        read(tmp_path / "a.ds")


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 33 + 12 * 5 + 8 * 6), st.integers(0, 255))
def test_a_changed_byte_of_an_index_is_refused_or_moves_bounds_only(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    made.megatron(folder / "a", DOCUMENTS)
    change(folder / "a.idx", at, bytes([value]))
    try:
        documents = ids_of(read(folder / "a.idx"))
    except UserError:
        return
    assert joined(documents) == joined(DOCUMENTS), "no token may be lost or read twice"
    # Bounds that still grow, and a code of the same width (int16 for uint16), are all that can pass.
    assert documents == DOCUMENTS or at >= 34 + 12 * 5


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: (p / "a.csv.gz").write_bytes(gzip.compress(b"0,3\n3,5\n")), "ends at token 5, but there are 13"),
        (lambda p: (p / "a.csv.gz").write_bytes(gzip.compress(b"0,3\n4,13\n")), "line 2: .*begins at 3"),
        (lambda p: (p / "a.csv.gz").write_bytes(gzip.compress(b"0,14\n")), "line 1: .*ends at 13 at most"),
        (lambda p: (p / "a.csv.gz").write_bytes(gzip.compress(b"start,end\n")), "expected start,end in tokens"),
        (lambda p: cut(p / "a.csv.gz", 9), "cannot be read to its end"),
        (lambda p: (p / "a.csv.gz").write_bytes(b"0,13\n"), "cannot be read to its end"),
        (lambda p: cut(p / "a.npy"), "no whole number of ids of 2 bytes"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(harm: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    path = WRITERS["olmo"](tmp_path, DOCUMENTS)
    harm(tmp_path)
    with pytest.raises(UserError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: cut(p / "a.ds.index"), "it is cut off, or belongs to other tokens"),
        (lambda p: change(p / "a.ds.index", 8, b"\x01"), "end 1 is 1, expected 3 to 13"),
        (lambda p: change(p / "a.ds.index", 8, b"\xff"), "end 1 is 255, expected 3 to 13"),
        (lambda p: cut(p / "a.ds.loss"), "expected one for each of the 13 tokens"),
        (lambda p: (p / "a.ds.metadata").write_text("x|4\n13\n"), "no whole number of ids of 4 bytes"),
        (lambda p: (p / "a.ds.metadata").write_text("x|2\n12\n"), "counts 12 tokens"),
        (lambda p: (p / "a.ds.metadata").write_text("x|3\n13\n"), "on a second line"),
    ],
)
def test_files_beside_a_ds_that_do_not_fit_are_refused(
    harm: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    made.datatrove(tmp_path / "a.ds", DOCUMENTS, loss=[1] * 13)
    harm(tmp_path)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.ds")


def test_without_files_beside_it_a_ds_is_an_array(tmp_path: Path) -> None:
    path = made.write_ids(tmp_path / "a.ds", DOCUMENTS)
    assert ids_of(read(path)) == DOCUMENTS and opened(path).facts == {"dtype": "uint16", "bounds": "end_token"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"PK\x03\x04" + bytes(60), "is a zip archive"),
        ("a.npy", b"\x93NUMPY\x01\x00" + bytes(3), "its header cannot be read"),
        ("a.npy", b"\x93NUMPY\x03\x00" + bytes(80), "version"),
        ("a.bin", np.array([5, 6, 7] * 40, "<u4").tobytes(), "every second id is 0.*--dtype uint32"),
        ("a.bin", (20240520).to_bytes(4, "little") + bytes(1100), "begins as a file of llm.c"),
        ("a.bin", (20240801).to_bytes(4, "little"), "begins as a file of llm.c"),
        ("a.parquet", b"PAR1" + bytes(30), "is not a readable Parquet file"),
        ("a.arrow", b"ARROW1\0\0" + bytes(30), "is not a readable Arrow file"),
        ("a.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr'\x00: '<u2'}", "its header cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"input_ids": [1]}')[:10] + b"\xff" * 20, r"damaged \.gz data"),
        ("a.arrow", b"\xff" * 40, "is not a readable Arrow stream"),
    ],
)
def test_what_is_no_array_or_table_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_types_that_are_no_ids_are_refused(tmp_path: Path) -> None:
    for array, message in [
        (np.zeros(4, "<f4"), r"holds float32 \[4\]"),
        (np.zeros((1, 2, 2), "<u2"), r"\[1, 2, 2\]; expected integers"),
    ]:
        with pytest.raises(UserError, match=message):
            read(made.numpy_array(tmp_path / "a.npy", array))
    made.numpy_array(tmp_path / "a.npy", np.zeros(4, "<u2"))
    append(tmp_path / "a.npy")
    with pytest.raises(UserError, match="expected 136 for"):
        read(tmp_path / "a.npy")
    for column in ([1.5], "text", 5):
        with pytest.raises(UserError, match="expected a list of integers"):
            read(made.parquet(tmp_path / "a.parquet", {"input_ids": [column]}))
    with pytest.raises(UserError, match=r"none of the columns input_ids, .*found \['a'\].*--ids-column"):
        read(made.parquet(tmp_path / "a.parquet", {"a": [[1]]}))
    for option in ("ids_column", "mask_column", "attention_column"):
        with pytest.raises(UserError, match="no column 'x'; found"):
            read(made.parquet(tmp_path / "a.parquet", {"ids": [[1]]}), **{option: "x"})


def test_a_type_is_guessed_by_the_vocabulary_or_named(tmp_path: Path) -> None:
    wide = made.write_ids(tmp_path / "a.bin", DOCUMENTS, "<u4")
    assert ids_of(read(wide, dtype="uint32")) == DOCUMENTS
    assert ids_of(read(wide, vocab_size=70_000)) == DOCUMENTS
    with pytest.raises(UserError, match="another tokenizer made it, or its type is another"):
        read(made.write_ids(tmp_path / "b.bin", DOCUMENTS * 2), dtype="uint32")


def test_files_are_found_by_prefix_folder_glob_and_format(tmp_path: Path) -> None:
    for part in ("x", "y"):
        (tmp_path / "m" / part).mkdir(parents=True)
        made.megatron(tmp_path / "m" / part / "c_text", DOCUMENTS)
    names = ["x/c_text", "y/c_text"]

    def found(*entries: str, wanted: str | None = None) -> list[str]:
        files = find_token_files([str(tmp_path / entry) for entry in entries], wanted)
        assert all(file.path.is_file() for file in files)
        return [file.name for file in files]

    assert found("m") == names and found("m/*/c_text.idx") == names and found("m/*/*") == names
    assert found("m/x/c_text", "m/x/c_text.bin", "m/x/c_text.idx") == ["c_text"], "named three times, read once"
    (tmp_path / "o").mkdir()
    WRITERS["olmo"](tmp_path / "o", DOCUMENTS)
    assert found("o") == found("o/*") == ["a.npy"]
    json_lines(tmp_path / "o" / "b.jsonl", DOCUMENTS)
    with pytest.raises(UserError, match=r"several formats \(1 of array, 1 of jsonl\); name one by --format"):
        found("o")
    assert found("o", wanted="array") == ["a.npy"]
    for entry, message in [
        ("nowhere", "no such file, prefix or folder"),
        ("o/a.csv.gz", "belongs to a file of format array"),
        ("none/*.npy", "no file matches it"),
    ]:
        with pytest.raises(UserError, match=message):
            found(entry)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no .*parquet"):
        found("empty")
    (tmp_path / "empty" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"several splits \['train', 'test'\]"):
        found("empty")
