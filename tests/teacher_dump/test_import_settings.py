"""Settings of imports and of prepare that would do nothing are refused; those that apply are followed everywhere."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pydantic import ValidationError

from potstill.common.errors import UserError
from potstill.storage import MismatchError, StoreReader
from potstill.teacher_dump import ImportTokensConfig, PrepareConfig, import_tokens
from potstill.teacher_dump.importing.format_options import check_options
from potstill.teacher_dump.importing.targets.config import ImportTargetsConfig
from potstill.teacher_dump.importing.targets.run import import_targets
from potstill.teacher_dump.importing.targets.tables import whole_numbers
from potstill.teacher_dump.importing.tokens.formats import TOKEN_FORMATS
from potstill.teacher_dump.records.base import BadRecord, Record
from potstill.teacher_dump.records.prompts import Prompts
from potstill.teacher_dump.tokenizer import text_encoder
from tests.student_train import tiny
from tests.teacher_dump import token_files as made
from tests.teacher_dump.foreign_files import (
    K,
    Truth,
    truth_of,
    write_distillkit,
    write_megatron,
    write_tar,
    write_topk,
)
from tests.teacher_dump.test_import_formats import DOCUMENTS, WRITERS, ids_of, read, source
from tests.teacher_dump.token_files import END, joined


@pytest.mark.parametrize("bounds", ["end_token", "none"])
@pytest.mark.parametrize("name", ["megatron <u2", "megatron with modes", "olmo", "datatrove", "ids"])
def test_bounds_that_are_named_are_followed(name: str, bounds: str, tmp_path: Path) -> None:
    documents = [[5, 7, END, 9, END], [11, 12], [END]]
    expected = [[5, 7, END], [9, END], [11, 12, END]] if bounds == "end_token" else [joined(documents)]
    path = WRITERS[name](tmp_path, documents)
    assert ids_of(read(path, bounds=bounds)) == expected


def test_end_tokens_part_the_rows_of_an_array(tmp_path: Path) -> None:
    path = made.numpy_array(tmp_path / "a.npy", np.array([[5, END, 6], [7, 8, END]], "<u2"))
    assert ids_of(read(path)) == [[5, END, 6], [7, 8, END]]
    assert ids_of(read(path, bounds="end_token")) == [[5, END], [6], [7, 8, END]]
    assert [one.together.tolist() for one in read(path, bounds="end_token", longest=3)] == [
        [5, END, 6], [5, END, 6], [7, 8, END]
    ]  # fmt: skip


def test_other_kinds_of_input_are_refused_whatever_the_bounds(tmp_path: Path) -> None:
    modes = bytes([0, 0, 1, 0, 0])
    with pytest.raises(UserError, match="sequence 2 has mode 1"):
        read(made.megatron(tmp_path / "a", DOCUMENTS, modes=modes), bounds="end_token")


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("megatron", {"mask_column": "labels"}, "mask_column is of files of format table or jsonl, .* format megatron"),
        ("array", {"ids_column": "ids"}, "ids_column is of files of format table or jsonl"),
        ("datatrove", {"attention_column": "a"}, "attention_column is of files of format table or jsonl"),
        ("table", {"dtype": "uint32"}, "dtype is of files of format array or datatrove"),
    ],
)
def test_options_that_a_format_does_not_have_are_refused(format: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_options(TOKEN_FORMATS, format, {"dtype": None, "mask_column": None, **options})


def test_a_type_that_is_not_the_one_of_the_header_is_refused(tmp_path: Path) -> None:
    path = WRITERS["numpy"](tmp_path, DOCUMENTS)
    assert ids_of(read(path, dtype="int32")) == DOCUMENTS
    with pytest.raises(UserError, match="says that its ids are int32, and --dtype is uint16; leave it out"):
        read(path, dtype="uint16")
    with pytest.raises(UserError, match="says that its ids are uint16, and --dtype is int64; leave it out"):
        read(WRITERS["llm.c"](tmp_path, DOCUMENTS), dtype="int64")


def test_a_mask_is_beside_all_files_or_none(tmp_path: Path) -> None:
    made.datatrove(tmp_path / "a.ds", DOCUMENTS, loss=[1] * 13)
    made.datatrove(tmp_path / "b.ds", DOCUMENTS)
    with pytest.raises(UserError, match=r"b\.ds: no mask .*1 of 2 files"):
        read(tmp_path)


def test_a_hole_in_a_column_of_booleans_is_a_broken_record(tmp_path: Path) -> None:
    flags = pa.array([[True, None], [True, False]])
    path = made.parquet(tmp_path / "a.parquet", {"input_ids": [[5, END], [7, END]], "m": flags})
    with pytest.raises(UserError, match=r"row 1: column 'm' is null at token 1"):
        read(path, mask_column="m")
    (found,) = read(path, mask_column="m", bad=1)
    assert found.mask is not None and found.mask.tolist() == [True, False]


def test_padding_that_begins_after_the_first_line_is_no_text(tmp_path: Path) -> None:
    lines = [{"input_ids": [5, END]}, {"input_ids": [7, END, 0, 0], "attention_mask": [1, 1, 0, 0]}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="line 2: it has 'attention_mask', which the first line has not"):
        read(path)


@pytest.mark.parametrize("model", [PrepareConfig, ImportTokensConfig])
def test_a_window_without_packing_whole_is_refused(model: type[Any], tmp_path: Path) -> None:
    settings = {"input": [tmp_path], "output": tmp_path / "o", "tokenizer": tmp_path}
    assert model(**settings, packing="whole", packing_window=7).packing_window == 7
    for packing in ("cut", "rows"):
        with pytest.raises(ValidationError, match=f"packing_window is of packing=whole, and packing is {packing}"):
            model(**settings, packing=packing, packing_window=7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"response_field": "q"}, "prompt_field and response_field are both 'q'"),
        ({"prompt_format": "{prompt} {response}"}, "prompt_format is .*{response} would be written there as it stands"),
        (
            {"response_format": "{prompt}{response}"},
            "response_format is .*{prompt} would be written there",
        ),
    ],
)
def test_prompts_and_responses_that_are_mixed_up_are_refused(
    settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    plain: dict[str, Any] = {"input": [tmp_path], "output": tmp_path / "o", "tokenizer": tmp_path}
    with pytest.raises(ValidationError, match=message):
        PrepareConfig(**(plain | {"prompt_field": "q", "response_field": "a"} | settings))


@pytest.mark.parametrize("key", ["prompt_format", "response_format"])
def test_special_tokens_in_a_format_are_refused(key: str, tokenizer_folder: Path) -> None:
    encoder = text_encoder(str(tokenizer_folder), append_eos=True, add_bos=False)
    kind = replace(Prompts(prompt_field="q", response_field="a"), **{key: "<|endoftext|>{prompt}{response}"})
    record = kind.read({"q": "still", "a": "pot"})
    assert isinstance(record, Record)
    with pytest.raises(UserError, match=rf"{key} holds the special token '<\|endoftext\|>'"):
        kind.encode(encoder, [record])


@pytest.fixture(scope="module")
def truths() -> list[Truth]:
    return [truth_of(row) for row in tiny.token_rows(8)]


@pytest.fixture(scope="module")
def tokens(truths: list[Truth], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bigram") / "tokens"
    tiny.write_store(path, tiny.spec_of("tokens", num_rows=None, rows_per_unit=4), [one.row for one in truths])
    return path


def import_of(path: Path, tokens: Path, output: Path, **options: Any) -> tuple[Any, StoreReader]:
    config = ImportTargetsConfig(input=[str(path)], output=output, teacher="t", tokens=str(tokens), **options)
    return import_targets(config), StoreReader(output / "targets")


def test_options_of_other_formats_of_targets_are_refused(truths: list[Truth], tokens: Path, tmp_path: Path) -> None:
    paths = {
        "distillkit": write_distillkit(tmp_path / "d", truths),
        "topk_parquet": write_topk(tmp_path / "t.parquet", truths),
        "megatron_logits": write_megatron(tmp_path / "m", truths),
    }
    for format, key in [
        ("distillkit", "ids_column"),
        ("distillkit", "normaliser_column"),
        ("topk_parquet", "compression_config"),
        ("megatron_logits", "attention_column"),
        ("distillkit", "values"),
    ]:
        with pytest.raises(UserError, match=f"{key} is of files of format .* these are of format {format}"):
            import_of(paths[format], tokens, tmp_path / "out", **{key: "logits"})


def test_no_entry_is_left_out_because_the_first_record_has_fewer(
    truths: list[Truth], tokens: Path, tmp_path: Path
) -> None:
    kept = [3, *[K] * (len(truths) - 1)]
    columns = {
        "topk_ids": [one.ids[:, :k].tolist() for one, k in zip(truths, kept, strict=True)],
        "topk_logprobs": [one.logprobs[:, :k].tolist() for one, k in zip(truths, kept, strict=True)],
    }
    path = write_topk(tmp_path / "t.parquet", truths, **columns)
    with pytest.raises(UserError, match=rf"record 2 .*has {K} entries, and 3 were expected .*set --k"):
        import_of(path, tokens, tmp_path / "out")
    for k in (4, K, 20):
        _, reader = import_of(path, tokens, tmp_path / f"out{k}", k=k)
        (row,) = reader.targets_rows([1])
        assert np.diff(row.targets.offsets).max() == min(k, K)


def test_ids_that_a_short_float_has_rounded_are_refused() -> None:
    assert whole_numbers(np.array([2048, 7], np.float16), "ids").tolist() == [2048, 7]
    assert whole_numbers(np.array([1 << 24], np.float32), "ids").tolist() == [1 << 24]
    for array in (np.array([2050], np.float16), np.array([(1 << 24) + 2], np.float32)):
        with pytest.raises(BadRecord, match="ids above were rounded to others"):
            whole_numbers(array, "ids")


def test_a_missing_iteration_is_refused(truths: list[Truth], tokens: Path, tmp_path: Path) -> None:
    path = write_megatron(tmp_path / "m", [*truths, *truths[:4]])
    (tar,) = path.glob("*.tar")
    members = {}
    with tarfile.open(tar) as found:
        for name in ("0.pt.zst", "2.pt.zst"):
            stream = found.extractfile(name)
            assert stream is not None
            members[int(name[0])] = zstandard.ZstdDecompressor().decompressobj().decompress(stream.read())
        stream = found.extractfile("_meta.json")
        assert stream is not None
        meta = json.loads(stream.read())
    write_tar(tar, members, meta)
    with pytest.raises(UserError, match="iteration 1 is missing, between 0 and 2"):
        import_of(path, tokens, tmp_path / "out")


def test_rows_of_several_documents_need_files_that_say_so(truths: list[Truth], tokens: Path, tmp_path: Path) -> None:
    assert any(len(one.row.doc_lens) > 1 for one in truths)
    with_bounds, _ = import_of(write_topk(tmp_path / "a.parquet", truths), tokens, tmp_path / "a")
    assert with_bounds.notes == ()
    without, _ = import_of(write_topk(tmp_path / "b.parquet", truths, attention_mask=[]), tokens, tmp_path / "b")
    assert len(without.notes) == 1 and "read them apart" in without.notes[0]


def test_a_run_goes_with_its_column_of_documents(truths: list[Truth], tmp_path: Path, tokenizer_folder: Path) -> None:
    path = write_distillkit(tmp_path / "d", truths, other=[[1] * len(one.row.tokens) for one in truths])
    common: dict[str, Any] = {"input": [str(path)], "output": tmp_path / "out", "teacher": "t"}
    common["tokenizer"] = str(tokenizer_folder)
    import_targets(ImportTargetsConfig(**common))
    with pytest.raises(MismatchError, match="segments"):
        import_targets(ImportTargetsConfig(**common, attention_column="other"))


def test_files_that_are_read_in_several_ways_are_said(tmp_path: Path) -> None:
    columns = {"input_ids": [[5, 7, END]]}
    made.parquet(tmp_path / "a.parquet", columns)
    assert source(tmp_path).notes == []
    made.parquet(tmp_path / "b.parquet", columns | {"attention_mask": [[1, 1, 1]]})
    (note,) = source(tmp_path).notes
    assert "not all files are read in one way" in note and "attention_mask" in note


def test_an_end_token_that_is_not_used_is_said(tmp_path: Path, tokenizer_folder: Path) -> None:
    common: dict[str, Any] = {"tokenizer": tokenizer_folder, "row_length": 8, "end_token": 7}
    for number, (name, unused) in enumerate({"megatron <u2": True, "ids": False, "parquet": True}.items()):
        (tmp_path / str(number)).mkdir()
        path = WRITERS[name](tmp_path / str(number), DOCUMENTS)
        made_of = import_tokens(ImportTokensConfig(input=[str(path)], output=tmp_path / f"o{number}", **common))
        assert any("end_token 7 is not used" in note for note in made_of.notes) == unused
