"""What a person reads when a path is wrong or a store is not ready: what is there, and a command that exists."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest

from potstill.launch.commands import COMMANDS
from potstill.storage import (
    MismatchError,
    NotAStoreError,
    StoreError,
    StoreExistsError,
    StoreReader,
    StoreWriter,
    UnsealedError,
    WriteFailedError,
    check_output,
    collect_garbage,
    discard_store,
    discard_unused,
    seal_store,
    store_status,
)
from tests.storage.stores import make_tokens_row, targets_spec, tokens_spec, write_tokens

# A flag or argument of the Python API is no help on a command line, unless it is said to be Python.
COMMAND = re.compile(r"potstill ([a-z]+)")


def message(kind: type[StoreError], path: Path) -> str:
    with pytest.raises(kind) as caught:
        StoreReader(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    assert set(COMMAND.findall(text)) <= {command.name for command in COMMANDS}
    return text


def test_a_folder_that_does_not_exist_is_not_called_a_store(tmp_path: Path) -> None:
    write_tokens(tmp_path / "data" / "train", 4)
    assert "does not exist; did you mean" in message(NotAStoreError, tmp_path / "data" / "trian")
    assert message(NotAStoreError, tmp_path / "data" / "trian").endswith(f"{tmp_path / 'data' / 'train'}?")
    # The wrong part of the path may be any of its names.
    assert message(NotAStoreError, tmp_path / "dat" / "train").endswith(f"did you mean {tmp_path / 'data'}?")
    assert f"stores in {tmp_path / 'data'}: train" in message(NotAStoreError, tmp_path / "data" / "x")
    assert f"nearest folder that does is {tmp_path}" in message(NotAStoreError, tmp_path / "other" / "place")
    with pytest.raises(NotAStoreError, match="does not exist"):
        store_status(tmp_path / "nope")


def test_a_folder_without_a_store_says_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no run.json, so it is not a store" in message(NotAStoreError, tmp_path / "empty")
    write_tokens(tmp_path / "data" / "train", 4)
    write_tokens(tmp_path / "data" / "heldout", 4)
    text = message(NotAStoreError, tmp_path / "data")
    assert "these folders in it are: heldout, train" in text
    (tmp_path / "file").write_text("x")
    assert "is a file, expected the folder of a store" in message(NotAStoreError, tmp_path / "file")


def test_an_unsealed_store_names_the_commands_that_seal_it(tmp_path: Path) -> None:
    spec = tokens_spec()
    writer = StoreWriter.create(tmp_path / "t", spec)
    text = message(UnsealedError, tmp_path / "t")
    assert f"potstill status {tmp_path / 't'}" in text and f"potstill seal {tmp_path / 't'}" in text
    with pytest.raises(UnsealedError, match=f"potstill seal {tmp_path / 't'}"):
        collect_garbage(tmp_path / "t", dry_run=True)
    with pytest.raises(UnsealedError, match="run prepare again"):
        seal_store(tmp_path / "t")
    assert not writer.committed()


def test_another_run_is_told_by_its_fields_and_not_by_whole_trees(tmp_path: Path) -> None:
    info = {"text_field": "body", "input": {"digest": "a" * 200, "files": 1}}
    StoreWriter.create(tmp_path / "t", tokens_spec(info=info))
    other = {"text_field": "text", "input": {"digest": "b" * 200, "files": 1}}
    with pytest.raises(MismatchError) as caught:
        StoreWriter.create(tmp_path / "t", tokens_spec(info=other))
    text = str(caught.value)
    assert 'info.text_field is "body" in the store, "text" is wanted now' in text
    assert "files" not in text and "{" not in text and "a" * 100 not in text and "--force" in text


def test_a_store_of_another_kind_is_never_offered_for_deletion(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "t", 4)
    with pytest.raises(MismatchError, match="a tokens store stands here, targets are to be written") as caught:
        StoreWriter.create(tmp_path / "t", targets_spec(4, tokens.digest))
    assert "force" not in str(caught.value)
    with pytest.raises(MismatchError, match="a tokens store stands here"):
        StoreWriter.create(tmp_path / "t", targets_spec(4, tokens.digest), force=True)
    assert StoreReader(tmp_path / "t").digest == tokens.digest


def test_the_folders_above_a_store_are_made(tmp_path: Path) -> None:
    StoreWriter.create(tmp_path / "runs" / "today" / "t", tokens_spec())
    assert store_status(tmp_path / "runs" / "today" / "t").committed == 0


def test_a_place_is_looked_at_without_touching_it(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "store")
    assert not (tmp_path / "new").exists()
    write_tokens(tmp_path / "t", 4)
    check_output(tmp_path / "t")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(StoreExistsError, match=r"a\.txt"):
        check_output(tmp_path / "notes")
    for path in (tmp_path / "notes" / "a.txt", tmp_path / "notes" / "a.txt" / "below"):
        with pytest.raises(WriteFailedError, match="is a file, expected a folder"):
            check_output(path)
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "notes").chmod(0o555)
        with pytest.raises(WriteFailedError, match="may not be written"):
            check_output(tmp_path / "notes" / "new")
        (tmp_path / "notes").chmod(0o755)


def test_a_store_without_a_unit_holds_no_place(tmp_path: Path) -> None:
    first, second = tokens_spec(row_length=16), tokens_spec(row_length=32)
    assert StoreWriter.resume(tmp_path / "t", first) is None and not (tmp_path / "t").exists()
    StoreWriter.create(tmp_path / "t", first)
    assert StoreWriter.resume(tmp_path / "t", second) is None
    writer = StoreWriter.create(tmp_path / "t", second, force=True)
    writer.commit_unit(0, [make_tokens_row(row, second) for row in writer.unit_rows(0)])
    found = StoreWriter.resume(tmp_path / "t", second)
    assert found is not None and found.record(0) is not None and found.record(1) is None
    with pytest.raises(MismatchError, match="row_length is 32 in the store, 16 is wanted now"):
        StoreWriter.resume(tmp_path / "t", first)
    discard_unused(tmp_path / "t")
    assert store_status(tmp_path / "t").committed == 1
    StoreWriter.create(tmp_path / "u", first)
    discard_unused(tmp_path / "u")
    assert not (tmp_path / "u").exists()


def test_only_the_store_of_its_own_writer_is_discarded(tmp_path: Path) -> None:
    plain = tokens_spec(row_length=16)
    for name, info in (("own", {"rollout": {}}), ("other", {"part": "train"})):
        spec = dataclasses.replace(plain, info=info)
        writer = StoreWriter.create(tmp_path / name, spec)
        writer.commit_unit(0, [make_tokens_row(row, spec) for row in writer.unit_rows(0)])
    for name, kind in (("other", "tokens"), ("own", "scores")):
        with pytest.raises(MismatchError, match="is a store of tokens that rollout did not write; name another output"):
            discard_store(tmp_path / name, kind=kind, writer="rollout")
        assert store_status(tmp_path / name).committed == 1
    discard_store(tmp_path / "own", kind="tokens", writer="rollout")
    discard_store(tmp_path / "own", kind="tokens", writer="rollout")
    assert not (tmp_path / "own").exists()
