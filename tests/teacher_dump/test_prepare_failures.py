"""A prepare that fails leaves nothing that is in the way of the next: bad options, kills, full disks, races."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.common.errors import UserError
from potstill.launch.cli import main
from potstill.storage import MismatchError, StoreReader, StoreWriter, WriteFailedError
from potstill.teacher_dump import PrepareConfig, prepare
from potstill.teacher_dump.tokenizer import load_tokenizer, tokenizer_digest
from tests.teacher_dump.tiny import save_llama, some_texts, write_jsonl


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", some_texts(200))


def config(corpus: Path, output: Path, tokenizer: Path | None, **changes: Any) -> PrepareConfig:
    settings = {"input": [corpus], "output": output, "tokenizer": tokenizer, "row_length": 32, "rows_per_unit": 4}
    return PrepareConfig(**(settings | changes))


@pytest.mark.parametrize(
    "wrong",
    [
        {"text_field": "body"},
        {"heldout_fraction": 1e-9},
        {"tokenizer": None, "train_tokenizer": {"vocab_size": 270}, "text_field": "body"},
        {"tokenizer": None, "train_tokenizer": {"vocab_size": 270}, "heldout_fraction": 1e-9, "rows_per_unit": 4096},
    ],
)
def test_a_first_run_that_failed_leaves_nothing(
    wrong: dict[str, Any], corpus: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    out = tmp_path / "new" / "out"
    wrong = {"rows_per_unit": 4096, **wrong}
    with pytest.raises(UserError):
        prepare(config(corpus, out, **({"tokenizer": tokenizer_folder} | wrong)))
    assert not out.parent.exists()
    # Every option may be another one now.
    done = prepare(config(corpus, out, None, train_tokenizer={"vocab_size": 280}, row_length=16, heldout_fraction=0.1))
    assert done.stores[0].rows > 4 and StoreReader(out / "train").spec.row_length == 16


def test_another_tokenizer_may_follow_a_failed_run(corpus: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no field 'body'"):
        prepare(config(corpus, out, tokenizer_folder, text_field="body"))
    prepare(config(corpus, tmp_path / "other", None, train_tokenizer={"vocab_size": 280}))
    prepare(config(corpus, out, tmp_path / "other" / "tokenizer"))
    digest = StoreReader(tmp_path / "other" / "train").spec.tokenizer_digest
    assert tokenizer_digest(load_tokenizer(str(out / "tokenizer"))) == digest


def test_rows_that_were_written_do_hold_the_place(corpus: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="--force, because rows of the other part"):
        prepare(config(corpus, out, tokenizer_folder, heldout_fraction=1e-9))
    with pytest.raises(MismatchError, match=r"held-out share .*: the store has 1e-09, this"):
        prepare(config(corpus, out, tokenizer_folder))
    prepare(config(corpus, out, tokenizer_folder, force=True))


def test_a_run_json_without_rows_is_replaced(corpus: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    """A kill between run.json and the first record, which no handler can clean up."""
    prepare(config(corpus, tmp_path / "whole", tokenizer_folder))
    spec = StoreReader(tmp_path / "whole" / "train").spec
    out = tmp_path / "out"
    StoreWriter.create(out / "train", spec)
    prepare(config(corpus, out, tokenizer_folder, row_length=16))
    assert StoreReader(out / "train").spec.row_length == 16


def test_force_deletes_only_when_there_is_something_to_put_there(
    corpus: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    out = tmp_path / "out"
    prepare(config(corpus, out, tokenizer_folder))
    before = StoreReader(out / "train").digest
    with pytest.raises(UserError, match="no field 'body'"):
        prepare(config(corpus, out, tokenizer_folder, text_field="body", force=True))
    assert StoreReader(out / "train").digest == before


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteFailedError, match="is a file, expected a folder"):
        prepare(config(tmp_path / "no such input", tmp_path / "file", tmp_path / "no such tokenizer"))


def test_another_prepare_that_took_the_place_is_noticed(
    corpus: Path, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file system has no locks, so that a second one was not told to wait."""
    from potstill.teacher_dump.prepared import Output

    finish, out = Output.finish, tmp_path / "out"

    def overtaken(self: Output, *args: Any, **options: Any) -> Any:
        summary = finish(self, *args, **options)
        monkeypatch.undo()
        prepare(config(corpus, tmp_path / "other", tokenizer_folder, row_length=16))
        shutil.rmtree(out / "train")
        (tmp_path / "other" / "train").rename(out / "train")
        return summary

    monkeypatch.setattr(Output, "finish", overtaken)
    with pytest.raises(MismatchError, match="another prepare"):
        prepare(config(corpus, out, tokenizer_folder))
    assert StoreReader(out / "train").spec.row_length == 16


def test_the_tokenizer_of_a_prepare_that_was_quicker_is_as_good(
    corpus: Path, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        shutil.copytree(self, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    prepare(config(corpus, tmp_path / "out", tokenizer_folder))
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["tokenizer", "train"]


@pytest.mark.parametrize("train", [False, True])
def test_a_disk_that_is_full_from_the_first_byte_on_to_the_last(
    train: bool,
    corpus: Path,
    tmp_path: Path,
    tokenizer_folder: Path,
    small_disk: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each size ends in one line; after each failure the disk grows and the same command continues."""
    whole = tmp_path / "whole"
    words = ["--vocab-size", "300"] if train else ["--tokenizer", str(tokenizer_folder)]
    words = ["prepare", "--input", str(corpus), *words, "--row-length", "32", "--rows-per-unit", "4", "--output"]
    assert main([*words, str(whole)]) == 0
    out = small_disk(4) / "a" / "out"
    failures, had_rows = 0, False
    for kib in (4, 12, 24, 40, 64, 96, 128, 2048):
        small_disk(kib)
        capsys.readouterr()
        code = main([*words, str(out)])
        error = capsys.readouterr().err
        if code == 0:
            break
        failures += 1
        assert code == 1 and "Traceback" not in error, error
        message = error[error.index("potstill prepare: error: ") :].strip()
        assert "\n" not in message and str(out) in message and "free space" in message and "run" in message
        had_rows = had_rows or any((out / "train" / "units").glob("*.json"))
        assert had_rows or not out.parent.exists()  # nothing pins while there is no row
    assert code == 0 and failures >= 3 and had_rows
    assert StoreReader(out / "train").digest == StoreReader(whole / "train").digest
    names = {path.name for path in out.iterdir()}
    assert names == {"train", "tokenizer"}


def test_rows_longer_than_the_tokenizers_model_reads_are_warned_of(
    corpus: Path, tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = save_llama(tmp_path / "model", vocab_size=300)  # reads 64 positions
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, model)
    with caplog.at_level(logging.WARNING, logger="potstill"):
        summary = prepare(config(corpus, tmp_path / "long", model, row_length=128))
    assert "row_length 128 exceeds the 64 positions" in caplog.text
    assert "max_position_embeddings of its config.json" in caplog.text and "--row-length 64" in summary.format()
    caplog.clear()
    assert not prepare(config(corpus, tmp_path / "short", model, row_length=64)).notes
    # Without a model beside it the tokenizer's own figure counts, if it has one.
    (model / "config.json").unlink()
    tokenizer = load_tokenizer(str(model))
    tokenizer.model_max_length = 100
    tokenizer.save_pretrained(tmp_path / "alone")
    note = prepare(config(corpus, tmp_path / "third", tmp_path / "alone", row_length=128)).notes[0]
    assert "100 positions" in note and "model_max_length of the tokenizer" in note
    assert not prepare(config(corpus, tmp_path / "fourth", tokenizer_folder, row_length=128)).notes


def test_a_conflict_is_told_key_by_key_in_the_words_of_the_options(
    corpus: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    prepare(config(corpus, tmp_path / "out", tokenizer_folder))
    other = write_jsonl(tmp_path / "other.jsonl", some_texts(150))
    changes: dict[str, Any] = {"row_length": 16, "rows_per_unit": 8, "packing": "whole", "heldout_fraction": 0.1}
    with pytest.raises(MismatchError) as caught:
        prepare(config(other, tmp_path / "out", tokenizer_folder, text_field="body", append_eos=False, **changes))
    first, *lines, last = str(caught.value).splitlines()
    assert first == f"{tmp_path / 'out' / 'train' / 'run.json'}: rows of another configuration stand here:"
    assert "use the options of that run" in last and "--force" in last
    assert "  row_length: the store has 32, this command wants 16" in lines
    assert "  rows_per_unit: the store has 4, this command wants 8" in lines
    assert '  packing: the store has "cut", this command wants "whole"' in lines
    assert '  text_field: the store has "text", this command wants "body"' in lines
    held_out = "  held-out share (heldout_fraction, heldout_documents): the store has 0, this command wants 0.1"
    assert held_out in lines
    starts = {line.split(":")[0].strip() for line in lines}
    assert {"content of the input", "bytes of the input", "append_eos"} <= starts and "tokenizer" not in starts
    assert all("{" not in line and len(line) < 120 for line in lines), lines
