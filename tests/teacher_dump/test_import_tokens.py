"""import tokens as a whole: rows, split, masks, records as rows, continuing after a kill, and what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.common.errors import UserError
from potstill.storage import MismatchError, StoreReader, StoreWriter, verify_store
from potstill.teacher_dump import ImportTokensConfig, PrepareConfig, import_tokens, prepare
from potstill.teacher_dump.importing.tokens.formats import TOKEN_FORMATS, TokenFormat
from potstill.teacher_dump.importing.tokens.source import TokenDocument
from potstill.teacher_dump.tokenizer import load_tokenizer, tokenizer_digest
from tests.teacher_dump import token_files as made
from tests.teacher_dump.tiny import some_texts, token_rows, write_jsonl
from tests.teacher_dump.token_files import END, Documents, joined, some_documents


def config(path: Path | list[Path], output: Path, tokens_of: Path, **changes: Any) -> ImportTokensConfig:
    entries = path if isinstance(path, list) else [path]
    settings = {"input": entries, "output": output, "tokenizer": tokens_of, "row_length": 32, "rows_per_unit": 4}
    return ImportTokensConfig(**(settings | changes))


def documents_of(store: Path | str) -> Documents:
    """The spans of all rows, those that a row's end cuts joined again: END ends a document."""
    found: Documents = [[]]
    for row in token_rows(Path(store)):
        for span in np.split(row.tokens, np.cumsum(row.doc_lens)[:-1]):
            if found[-1] and found[-1][-1] == END:
                found.append([])
            found[-1] += span.tolist()
    return found


def test_rows_are_those_that_prepare_makes_of_the_text(tmp_path: Path, tokenizer_folder: Path) -> None:
    texts = [text for text in some_texts(60) if text]
    ids = load_tokenizer(str(tokenizer_folder))(texts, add_special_tokens=False)["input_ids"]
    path = made.megatron(tmp_path / "c", [[*one, END] for one in ids])
    shape = {"row_length": 32, "rows_per_unit": 4}
    text = PrepareConfig(
        input=[write_jsonl(tmp_path / "c.jsonl", texts)], output=tmp_path / "a", tokenizer=tokenizer_folder, **shape
    )
    prepare(text)
    summary = import_tokens(config(path, tmp_path / "b", tokenizer_folder))
    mine, theirs = token_rows(tmp_path / "b" / "train"), token_rows(tmp_path / "a" / "train")
    assert [(one.tokens.tolist(), one.doc_lens.tolist()) for one in mine] == [
        (one.tokens.tolist(), one.doc_lens.tolist()) for one in theirs
    ]
    assert (summary.stores[0].documents, summary.stores[0].tokens) == (len(texts), sum(map(len, ids)) + len(ids))
    assert verify_store(tmp_path / "b" / "train", deep=True).ok
    assert tokenizer_digest(load_tokenizer(str(tmp_path / "b" / "tokenizer"))) == summary.tokenizer_digest
    # Without end tokens in the set they are put there.
    bare = made.megatron(tmp_path / "bare", [[*one, END] if number % 3 == 0 else one for number, one in enumerate(ids)])
    import_tokens(config(bare, tmp_path / "ended", tokenizer_folder, append_eos=True))
    assert documents_of(tmp_path / "ended" / "train") == documents_of(tmp_path / "a" / "train")


def test_run_json_says_what_was_read_and_how(tmp_path: Path, tokenizer_folder: Path) -> None:
    summary = import_tokens(config(made.megatron(tmp_path / "c", some_documents(9)), tmp_path / "o", tokenizer_folder))
    info = json.loads((tmp_path / "o" / "train" / "run.json").read_text())["info"]
    size = sum((tmp_path / f"c{end}").stat().st_size for end in (".bin", ".idx"))
    assert info["input"].pop("digest")
    assert info == {
        "part": "train",
        "input": {
            "format": "megatron",
            "files": 1,
            "bytes": size,
            "read_as": [{"dtype": "uint16", "bounds": "recorded"}],
        },
        "end_token": END,
        "append_eos": False,
        "split": {"threshold": "0", "salt": "potstill"},
    }
    assert "read 1 files of format megatron" in summary.format() and "9 documents" in summary.format()


def test_equal_ids_fall_on_one_side_whatever_the_format(tmp_path: Path, tokenizer_folder: Path) -> None:
    documents = some_documents(80)
    paths = [
        made.megatron(tmp_path / "c", documents, "<i4"),
        made.write_ids(tmp_path / "d.bin", documents),
        made.parquet(tmp_path / "e.parquet", {"ids": documents}),
    ]
    halves = []
    for number, path in enumerate(paths):
        out = tmp_path / f"out{number}"
        import_tokens(config(path, out, tokenizer_folder, heldout_fraction=0.3))
        halves.append([documents_of(out / part) for part in ("train", "heldout")])
    assert halves[0] == halves[1] == halves[2]
    train, heldout = halves[0]
    assert 10 < len(heldout) < 40 and sorted(train + heldout) == sorted(documents)
    few = config(paths[0], tmp_path / "few", tokenizer_folder, heldout_documents=5)
    import_tokens(few)
    chosen = documents_of(tmp_path / "few" / "heldout")
    assert len(chosen) == 5 and all(one in heldout for one in chosen), "those of smallest hash"


def test_prepare_knows_rows_as_well(tmp_path: Path, tokenizer_folder: Path) -> None:
    texts = [text for text in some_texts(12) if text]
    settings = {"input": [write_jsonl(tmp_path / "c.jsonl", texts)], "output": tmp_path / "o", "packing": "rows"}
    prepare(PrepareConfig(**settings, tokenizer=tokenizer_folder, row_length=400))
    ids = load_tokenizer(str(tokenizer_folder))(texts, add_special_tokens=False)["input_ids"]
    assert [row.tokens.tolist() for row in token_rows(tmp_path / "o" / "train")] == [[*one, END] for one in ids]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program catches it."""


def masked_ds(folder: Path, documents: Documents) -> Path:
    loss = np.random.default_rng(1).integers(0, 2, len(joined(documents)))
    return made.datatrove(folder / "a.ds", documents, loss=loss.tolist())


def packed_rows(folder: Path, documents: Documents) -> Path:
    rows = [joined(documents[i : i + 3])[:32] for i in range(0, len(documents), 3)]
    rows[7] = [999]  # a broken record
    attention = [[1 + (i > len(row) // 2) for i in range(len(row))] for row in rows]
    return made.parquet(folder / "a.parquet", {"input_ids": rows, "attention_mask": attention}, group=5)


@pytest.mark.parametrize(
    ("write", "changes"),
    [
        (lambda p, d: made.megatron(p / "a", d), {"heldout_fraction": 0.3}),
        (lambda p, d: [made.write_ids(p / f"{n}.bin", d[n::3]) for n in range(3)], {"packing": "whole"}),
        (masked_ds, {"heldout_fraction": 0.3}),
        (packed_rows, {"packing": "rows", "max_bad_lines": 1, "heldout_fraction": 0.3}),
        (packed_rows, {"packing": "whole", "packing_window": 6, "max_bad_lines": 1}),
        (lambda p, d: made.write_ids(p / "a.bin", d), {"bounds": "none"}),
    ],
    ids=["megatron", "whole", "masks", "rows", "parts", "stream"],
)
def test_a_killed_import_continues_to_equal_stores(
    write: Callable[[Path, Documents], Any],
    changes: dict[str, Any],
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(tmp_path, some_documents(60))
    changes = {"rows_per_unit": 3, **changes}
    whole = import_tokens(config(path, tmp_path / "whole", tokenizer_folder, **changes))
    commit = StoreWriter.commit_unit
    left = 0

    def dying_commit(self: StoreWriter, *args: Any, **options: Any) -> bool:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return commit(self, *args, **options)

    monkeypatch.setattr(StoreWriter, "commit_unit", dying_commit)
    kills = 0
    while True:  # every run commits one unit and is killed before its second: each cursor is used once
        left = 1
        try:
            again = import_tokens(config(path, tmp_path / "killed", tokenizer_folder, **changes))
            break
        except Killed:
            kills += 1
    assert kills >= 4
    for one, other in zip(whole.stores, again.stores, strict=True):
        assert StoreReader(one.path).digest == StoreReader(other.path).digest
        assert (one.documents, one.tokens, one.rows, one.counts) == (
            other.documents, other.tokens, other.rows, other.counts
        )  # fmt: skip
    assert again.bad_lines == whole.bad_lines == changes.get("max_bad_lines", 0)


def test_a_second_run_changes_nothing_and_other_input_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = made.megatron(tmp_path / "c", some_documents(30))
    first = import_tokens(config(path, tmp_path / "o", tokenizer_folder))
    again = import_tokens(config(path, tmp_path / "o", tokenizer_folder))
    assert again.stores == first.stores and again.resumed_rows == first.stores[0].rows
    made.megatron(tmp_path / "c", some_documents(31))
    with pytest.raises(MismatchError, match="content of the input"):
        import_tokens(config(path, tmp_path / "o", tokenizer_folder))
    assert import_tokens(config(path, tmp_path / "o", tokenizer_folder, force=True)).stores[0].documents == 31


def test_a_mask_is_that_of_the_file(tmp_path: Path, tokenizer_folder: Path) -> None:
    documents = some_documents(30)
    loss = np.random.default_rng(1).integers(0, 2, len(joined(documents)))
    path = made.datatrove(tmp_path / "a.ds", documents, loss=loss.tolist())
    summary = import_tokens(config(path, tmp_path / "o", tokenizer_folder))
    rows = token_rows(tmp_path / "o" / "train")
    assert np.concatenate([row.mask for row in rows]).tolist() == loss.astype(bool).tolist()  # type: ignore[misc]
    assert StoreReader(tmp_path / "o" / "train").spec.columns == ("mask",)
    trained = sum(int(row.has_target().sum()) for row in rows)
    assert f"{trained} tokens are trained on" in summary.format()
    # An end token that is put there is trained on as the token before it.
    bare = [document[:-1] for document in documents]
    on = [int(place % 3 > 0) for place in range(len(joined(bare)))]
    path = made.datatrove(tmp_path / "c.ds", bare, loss=on)
    import_tokens(config(path, tmp_path / "q", tokenizer_folder, append_eos=True))
    ended = token_rows(tmp_path / "q" / "train")
    ids, mask = (np.concatenate([getattr(row, name) for row in ended]) for name in ("tokens", "mask"))
    assert ids.tolist() == joined(documents) and mask[ids != END].tolist() == [bool(one) for one in on]
    assert mask[np.flatnonzero(ids == END)].tolist() == mask[np.flatnonzero(ids == END) - 1].tolist()
    none = made.datatrove(tmp_path / "b.ds", documents, loss=[0] * len(loss))
    with pytest.raises(UserError, match="rows have no token that is trained on"):
        import_tokens(config(none, tmp_path / "p", tokenizer_folder))
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("bounds", ["auto", "end_token"])
def test_records_are_kept_as_rows(bounds: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    ids = [[5, 6, END, 7], [8, 9], [10, 11, 12, END, 13]]
    path = made.parquet(tmp_path / "a.parquet", {"input_ids": ids})
    changes = {"packing": "rows", "bounds": bounds, "row_length": 5}
    summary = import_tokens(config(path, tmp_path / "o", tokenizer_folder, **changes))
    rows = token_rows(tmp_path / "o" / "train")
    assert [row.tokens.tolist() for row in rows] == ids
    inside = [[3, 1], [2], [4, 1]] if bounds == "end_token" else [[4], [2], [5]]
    assert [row.doc_lens.tolist() for row in rows] == inside
    assert summary.stores[0].documents == sum(map(len, inside))
    assert f"{4 / 15:.2%} of the rows is padding" in summary.format()
    with pytest.raises(UserError, match=r"row 3: a row of 5 tokens, where row_length is 4; raise it"):
        import_tokens(config(path, tmp_path / "p", tokenizer_folder, **changes | {"row_length": 4}))


def test_a_document_of_a_flat_file_may_exceed_memory(tmp_path: Path, tokenizer_folder: Path) -> None:
    """One stream of a million tokens: what is held is a unit of rows, not the document."""
    import tracemalloc

    ids = np.random.default_rng(0).integers(1, 300, 1_000_000)
    path = made.write_ids(tmp_path / "a.bin", [ids.tolist()])
    load_tokenizer(str(tokenizer_folder))
    tracemalloc.start()
    changes = {"row_length": 1000, "rows_per_unit": 20, "bounds": "none"}
    summary = import_tokens(config(path, tmp_path / "o", tokenizer_folder, **changes))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert summary.stores[0].rows == 1000 and summary.stores[0].documents == 1
    assert np.array_equal(np.concatenate([row.tokens for row in token_rows(tmp_path / "o" / "train")]), ids)
    assert peak < 1_000_000, peak


def test_a_format_is_one_entry_of_a_table(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.numerals").write_text("5 6 0\n7 0\n")
    with pytest.raises(UserError, match="its name does not tell what it holds"):
        import_tokens(config(tmp_path / "a.numerals", tmp_path / "o", tokenizer_folder))
    entry = TokenFormat(module=made.__name__, description="decimal numbers", suffixes=(".numerals",))
    monkeypatch.setitem(TOKEN_FORMATS, "numerals", entry)  # type: ignore[arg-type]
    import_tokens(config(tmp_path / "a.numerals", tmp_path / "o", tokenizer_folder))
    assert documents_of(tmp_path / "o" / "train") == [[5, 6, 0], [7, 0]]
    by_name = {"format": "numerals", "force": True}
    assert import_tokens(config(tmp_path, tmp_path / "o", tokenizer_folder, **by_name)).source_format == "numerals"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mask_column": "m", "dtype": "uint16"},
            "dtype is of files of .* these are of format megatron",
        ),
        ({"end_token": 300}, r"end_token 300 is no id of tokenizer .* \(300 entries\)"),
        ({"heldout_fraction": 1e-12, "rows_per_unit": 99}, "no document fell into the held-out part"),
        ({"heldout_documents": 99}, "the input holds only 5 different documents"),
        ({"tokenizer": "nowhere/tokenizer"}, "nowhere/tokenizer"),
        ({"input": ["nowhere"]}, "nowhere"),
    ],
)
def test_what_cannot_be_is_said_and_leaves_nothing(
    changes: dict[str, Any], message: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    path = made.megatron(tmp_path / "c", some_documents(5))
    with pytest.raises(UserError, match=message):
        import_tokens(config(path, tmp_path / "o", tokenizer_folder, **changes))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heldout_fraction": 0.1, "heldout_documents": 3}, "at most one of heldout_fraction and heldout_documents"),
        ({"packing": "rows", "append_eos": True}, "packing rows keeps each record as it stands"),
        ({"too_long": "drop"}, "too_long is of packing=whole, and packing is cut"),
        ({"format": "megatorn"}, "did you mean 'megatron'"),
        ({"dtype": "float32"}, "uint8"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path / "a.bin", tmp_path / "o", tmp_path, **changes)


def test_a_set_without_tokens_is_said(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(UserError, match="the input holds no tokens to train on"):
        import_tokens(config(made.megatron(tmp_path / "c", []), tmp_path / "o", tokenizer_folder))


def test_a_tokenizer_without_an_end_is_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    backend = AutoTokenizer.from_pretrained(tokenizer_folder).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "bare")
    path = made.write_ids(tmp_path / "a.bin", some_documents(5))
    with pytest.raises(UserError, match=r"has no eos token, and append_eos needs one; name it \(--end-token\)"):
        import_tokens(config(path, tmp_path / "o", tmp_path / "bare", append_eos=True))
    summary = import_tokens(config(path, tmp_path / "o", tmp_path / "bare"))
    assert summary.stores[0].documents == 1 and "nothing says where documents end" in summary.format()
    named = import_tokens(config(path, tmp_path / "o", tmp_path / "bare", end_token=END, force=True))
    assert named.stores[0].documents == 5 and not named.notes


def test_the_key_of_a_document_is_of_its_ids() -> None:
    def key(ids: np.ndarray) -> str:
        return TokenDocument(None, ids, None, 0, ids).key()  # type: ignore[arg-type]

    assert key(np.array([1, 2], "<u2")) == key(np.array([1, 2], ">i8")) != key(np.array([1, 2, 0], "<u2"))
