"""The dataset card of a sealed store: right figures, no part of the store, and nobody's file is overwritten."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from potstill.launch.__main__ import main
from potstill.storage import (
    StoreError,
    StoreReader,
    StoreWriter,
    UnsealedError,
    collect_garbage,
    discard_store,
    repair_store,
    seal_store,
    store_status,
    verify_store,
    write_card,
)
from tests.storage.stores import tokens_spec, write_targets, write_tokens

TEACHER = {"id": "acme/big|one", "weights_digest": "ab" * 32, "dtype": "bfloat16", "engine": "hf", "checkpoint_step": 7}


def test_a_card_says_what_the_store_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = write_tokens(tmp_path / "tokens", 10)
    selection = {"k": 8, "mode": "top_k"}
    targets = write_targets(tmp_path / "targets", tokens, teacher=TEACHER, selection=selection, info={"dump": {}})
    bytes_before = {path: path.read_bytes() for path in (tmp_path / "targets").rglob("*") if path.is_file()}
    assert main(["seal", str(tmp_path / "targets"), "--card"]) == 0
    assert "dataset card written: README.md; fill in the licence" in capsys.readouterr().out
    card = (tmp_path / "targets" / "README.md").read_text(encoding="utf-8")
    matter = yaml.safe_load(card.split("---\n")[1])
    assert matter["size_categories"] == ["n<1K"] and matter["viewer"] is False
    assert {"potstill", "targets", "knowledge-distillation"} == set(matter["tags"])
    manifest = targets.manifest
    assert manifest is not None
    for said in (
        "| teacher | acme/big\\|one |",
        "| checkpoint | step 7 |",
        "ab" * 32,
        "mode top_k, k 8",
        targets.spec.tokenizer_digest,
        tokens.digest,
        targets.digest,
        f"| tokens | {targets.num_tokens:,} |",
        f"{manifest.num_bytes / targets.num_tokens:.1f} bytes a token",
    ):
        assert said in card
    # Nothing of the store has changed, and what walks through it takes no offence.
    assert all(path.read_bytes() == data for path, data in bytes_before.items())
    assert StoreReader(targets.url).digest == targets.digest and verify_store(targets.url, deep=True).ok
    assert store_status(targets.url).sealed and seal_store(targets.url, again=True).store_digest == targets.digest
    assert collect_garbage(targets.url, dry_run=False).files == () and (tmp_path / "targets" / "README.md").exists()
    repair_store(targets.url)
    assert (tmp_path / "targets" / "README.md").read_text(encoding="utf-8") == card
    # Once more it is the same; an edited one is left alone.
    assert main(["seal", str(tmp_path / "targets"), "--card"]) == 0
    assert "stands there already" in capsys.readouterr().out
    edited = card.replace("fill-in-before-publishing", "mit")
    (tmp_path / "targets" / "README.md").write_text(edited, encoding="utf-8")
    assert main(["seal", str(tmp_path / "targets"), "--card"]) == 1
    assert "is not the card of this store" in capsys.readouterr().err
    assert (tmp_path / "targets" / "README.md").read_text(encoding="utf-8") == edited
    # It goes with its store; somebody else's README.md does not.
    discard_store(targets.url, kind="targets", writer="dump")
    assert not (tmp_path / "targets").exists()


def test_the_lines_of_the_card_that_read_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = write_tokens(tmp_path / "tokens", 4)
    write_targets(tmp_path / "targets", tokens)
    monkeypatch.chdir(tmp_path)
    for name in ("tokens", "targets"):
        # As a copy that came without the empty folders: from the hub, or out of git.
        for folder in (tmp_path / name).iterdir():
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        assert write_card(name)
        card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
        assert code is not None
        exec(compile(code[1], f"{name}/README.md", "exec"), {})
        assert re.search(rf"```\npotstill verify {name} --deep\n```", card)


def test_an_open_store_has_no_card_and_other_files_stay(tmp_path: Path) -> None:
    StoreWriter.create(tmp_path / "open", tokens_spec())
    with pytest.raises(UnsealedError, match="not sealed"):
        write_card(tmp_path / "open")
    write_tokens(tmp_path / "other", 4, info={"prepare": {}})
    (tmp_path / "other" / "README.md").write_text("notes of my own", encoding="utf-8")
    with pytest.raises(StoreError, match="left as it is"):
        write_card(tmp_path / "other")
    discard_store(tmp_path / "other", kind="tokens", writer="prepare")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["README.md"]
