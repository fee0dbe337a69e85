"""prepare as a whole: what is in the stores, the split, going on after a kill, memory, and clear errors."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.common.errors import UserError
from potstill.storage import MismatchError, StoreReader, StoreWriter, UnsealedError, seal_store
from potstill.teacher_dump import PrepareConfig, prepare, preparing
from potstill.teacher_dump.split import Split
from potstill.teacher_dump.tokenizer import END_OF_TEXT, load_tokenizer, text_encoder, tokenizer_digest
from tests.teacher_dump.tiny import some_texts, token_rows, write_jsonl


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = some_texts(120)
    for part in range(3):
        path = write_jsonl(folder / f"part{part}.jsonl", texts[part * 40 : part * 40 + 40])
        with path.open("a") as stream:
            stream.write("broken {\n" * part)
    return folder


def config(corpus: Path, output: Path, tokenizer: Path | None, **changes: Any) -> PrepareConfig:
    settings = {
        "input": [corpus],
        "output": output,
        "tokenizer": tokenizer,
        "row_length": 32,
        "rows_per_unit": 4,
        "heldout_fraction": 0.2,
        "max_bad_lines": 10,
    }
    return PrepareConfig(**(settings | changes))


def digests(output: Path) -> dict[str, str]:
    return {part: StoreReader(output / part).digest for part in ("train", "heldout")}


def test_the_stores_hold_each_document_once(corpus: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    summary = prepare(config(corpus, tmp_path / "out", tokenizer_folder))
    assert summary.bad_lines == 3 and "3 broken records" in summary.format()
    tokenizer = load_tokenizer(str(tokenizer_folder))
    split = Split.by_fraction(0.2, salt="potstill")
    for store in summary.stores:
        ids = np.concatenate([row.tokens for row in token_rows(store.path)])
        texts = tokenizer.decode(ids).split(END_OF_TEXT)[:-1]
        wanted = [t for t in some_texts(120) if t and split.held_out(t) == (store.path.name == "heldout")]
        assert texts == wanted
        assert (store.documents, store.tokens) == (len(wanted), len(ids))
    reader = StoreReader(tmp_path / "out" / "train")
    assert reader.spec.vocab_size == 300 and reader.spec.tokenizer_digest == tokenizer_digest(tokenizer)


def test_a_second_run_changes_nothing(corpus: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    first = prepare(config(corpus, tmp_path / "out", tokenizer_folder))
    before = digests(tmp_path / "out")
    again = prepare(config(corpus, tmp_path / "out", tokenizer_folder))
    assert digests(tmp_path / "out") == before
    assert again.resumed_rows == sum(store.rows for store in first.stores)
    assert again.stores == first.stores and again.bad_lines == 3


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program catches it."""


def test_a_killed_run_goes_on_to_equal_stores(
    corpus: Path, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(config(corpus, tmp_path / "whole", tokenizer_folder))
    expected = digests(tmp_path / "whole")
    commit = StoreWriter.commit_unit
    left = 0

    def dying_commit(self: StoreWriter, *args: Any, **options: Any) -> bool:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return commit(self, *args, **options)

    monkeypatch.setattr(StoreWriter, "commit_unit", dying_commit)
    kills = refused_seals = 0
    # Every run commits one unit and is killed before its second: each cursor is used once.
    while True:
        left = 1
        try:
            summary = prepare(config(corpus, tmp_path / "killed", tokenizer_folder))
            break
        except Killed:
            kills += 1
            try:
                seal_store(tmp_path / "killed" / "train")
            except UnsealedError:
                refused_seals += 1
    assert kills >= 10
    assert refused_seals >= 5  # until the training side was whole; what is sealed too early would differ below
    assert digests(tmp_path / "killed") == expected
    assert summary.bad_lines == 3


def test_other_input_or_settings_do_not_mix_with_a_store(corpus: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    prepare(config(corpus, tmp_path / "out", tokenizer_folder))
    with pytest.raises(MismatchError, match="row_length"):
        prepare(config(corpus, tmp_path / "out", tokenizer_folder, row_length=33))
    before = digests(tmp_path / "out")
    write_jsonl(corpus / "part3.jsonl", ["one more"])
    with pytest.raises(MismatchError, match="files of the input: the store has 3, this command wants 4"):
        prepare(config(corpus, tmp_path / "out", tokenizer_folder))
    assert digests(tmp_path / "out") == before
    prepare(config(corpus, tmp_path / "out", tokenizer_folder, force=True))
    assert digests(tmp_path / "out") != before


def test_a_copy_of_the_tokenizer_stands_beside_the_stores(corpus: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    out = tmp_path / "out"
    digest = prepare(config(corpus, out, tokenizer_folder)).tokenizer_digest
    kept = load_tokenizer(str(out / "tokenizer"))
    assert tokenizer_digest(kept) == digest == StoreReader(out / "train").spec.tokenizer_digest
    assert kept.eos_token == END_OF_TEXT
    assert not list(out.glob("*.tmp"))
    marker = out / "tokenizer" / "marker"
    marker.touch()
    prepare(config(corpus, out, tokenizer_folder))  # the same one is left as it stands
    prepare(config(corpus, out, out / "tokenizer"))  # and may be named as the source itself
    assert marker.exists()
    other = tmp_path / "other"
    prepare(config(corpus, tmp_path / "trained", None, train_tokenizer={"vocab_size": 280}))
    (tmp_path / "trained" / "tokenizer").rename(other)
    (tmp_path / "new").mkdir()
    shutil.copytree(other, tmp_path / "new" / "tokenizer")
    with pytest.raises(UserError, match="is not the tokenizer of this run"):
        prepare(config(corpus, tmp_path / "new", tokenizer_folder))
    prepare(config(corpus, tmp_path / "new", tokenizer_folder, force=True))
    assert tokenizer_digest(load_tokenizer(str(tmp_path / "new" / "tokenizer"))) == digest


def test_force_deletes_a_tokenizer_but_nothing_that_somebody_put_there(
    corpus: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    mine = tmp_path / "out" / "tokenizer" / "notes"
    mine.mkdir(parents=True)
    (mine / "dear.txt").write_text("dear")
    with pytest.raises(UserError, match="deletes tokenizers only; it holds notes"):
        prepare(config(corpus, tmp_path / "out", tokenizer_folder, force=True))
    assert (mine / "dear.txt").read_text() == "dear"


def test_train_a_tokenizer_on_the_training_side(corpus: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    settings = config(corpus, tmp_path / "out", None, train_tokenizer={"vocab_size": 290})
    summary = prepare(settings)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert len(tokenizer) == summary.vocab_size <= 290
    assert tokenizer.eos_token == tokenizer.bos_token == END_OF_TEXT and tokenizer.eos_token_id == 0
    sample = "a pot still 酒\n\ttwice  "
    assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
    before = digests(tmp_path / "out")
    assert prepare(settings).tokenizer_digest == summary.tokenizer_digest  # it is not trained twice
    assert digests(tmp_path / "out") == before
    with pytest.raises(UserError, match="other settings or on other input"):
        prepare(config(corpus, tmp_path / "out", None, train_tokenizer={"vocab_size": 280}))


def test_bos_and_eos_go_round_each_document(tokenizer_folder: Path) -> None:
    both = text_encoder(str(tokenizer_folder), append_eos=True, add_bos=True)
    none = text_encoder(str(tokenizer_folder), append_eos=False, add_bos=False)
    plain = none.encode(["pot", ""])
    assert [ids.tolist() for ids in both.encode(["pot", ""])] == [[0, *plain[0].tolist(), 0], []]
    # A special token written out in a text stays text.
    inside = none.encode([f"a{END_OF_TEXT}b"])[0]
    assert 0 not in inside and len(inside) > 3


def test_a_tokenizer_without_eos_is_named(tokenizer_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    backend = AutoTokenizer.from_pretrained(tokenizer_folder).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="no eos token, but append_eos is on"):
        text_encoder(str(tmp_path / "bare"), append_eos=True, add_bos=False)
    bare = text_encoder(str(tmp_path / "bare"), append_eos=False, add_bos=False)
    assert bare.digest == text_encoder(str(tokenizer_folder), append_eos=False, add_bos=False).digest


@pytest.mark.parametrize(
    ("lines", "changes", "message"),
    [
        ([], {}, "all empty"),
        (["", ""], {"heldout_fraction": 0.0}, "holds no text to train on"),
        (["only one"], {"heldout_fraction": 1e-9}, "no document fell into the held-out part"),
        (["only one"], {"heldout_fraction": 0.0, "heldout_documents": 1}, "holds no text to train on"),
        (["x"], {"text_field": "body"}, "no field 'body'"),
    ],
)
def test_nothing_to_prepare_is_said(
    tmp_path: Path, tokenizer_folder: Path, lines: list[str], changes: dict[str, Any], message: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", lines)
    with pytest.raises(UserError, match=message):
        prepare(config(path, tmp_path / "out", tokenizer_folder, **changes))


def test_a_missing_tokenizer_is_named(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this folder does not exist"):
        prepare(config(corpus, tmp_path / "out", tmp_path / "no" / "tokenizer"))


def test_memory_does_not_grow_with_the_corpus(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "_BATCH_DOCUMENTS", 32)

    def peak_bytes(name: str, copies: int) -> int:
        path = write_jsonl(tmp_path / f"{name}.jsonl", ["the copper pot runs slow and clear " * 30] * copies)
        changes = {"heldout_fraction": 0.0, "row_length": 256, "rows_per_unit": 8}
        settings = config(path, tmp_path / name, tokenizer_folder, **changes)
        tracemalloc.start()
        prepare(settings)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes("warm", 10)
    small, large = peak_bytes("small", 200), peak_bytes("large", 1000)
    if large >= small + 300_000:
        # Python's own table of interned names may double within a run, once: a second run shows what grows.
        large = peak_bytes("again", 1000)
    assert (tmp_path / "large.jsonl").stat().st_size > 1_000_000
    assert large < small + 300_000, (small, large)
