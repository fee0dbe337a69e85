"""docs/python.md runs from top to bottom, on a corpus and a teacher made on the spot."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.examples.conftest import Folder
from tests.examples.test_examples import DOORS
from tests.teacher_dump.tiny import some_texts, write_jsonl

PAGE = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def test_the_page_runs_as_it_stands(
    stores: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stores.root / "models" / "teacher", tmp_path / "models" / "teacher")
    for file in stores.tokenizer.iterdir():
        shutil.copy(file, tmp_path / "models" / "teacher")
    write_jsonl(tmp_path / "corpus.jsonl", some_texts(160))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    assert len(BLOCKS) >= 11
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/python.md, block {number + 1}", "exec"), names)
    printed = capsys.readouterr().out
    assert re.search(r"KD \d+\.\d{3}  CE \d+\.\d{3} nats", printed)
    assert "joined store teacher" in printed and "input_digest is" in printed
    # What the comments claim of shapes and of what is skipped.
    assert names["packed"].input_ids.shape == (2, 64) == names["packed"].labels.shape
    assert names["packed"].targets.num_tokens == 128 == len(names["hidden"])
    assert len(names["rank"]) == 128  # so that the block on positions did its work
    assert len(str(names["state"])) < 1024


def test_the_page_imports_from_the_front_doors_only() -> None:
    for block in BLOCKS:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("potstill"):
                assert node.module in DOORS


def test_files_that_the_page_names_exist() -> None:
    named = set(re.findall(r"`((?:examples|tests)/[a-z_/.]+)`", PAGE)) | {
        f"docs/{name}" for name in re.findall(r"\]\(([a-z]+\.md)\)", PAGE)
    }
    assert len(named) >= 5
    assert [path for path in named if not (REPOSITORY / path).exists()] == []
    assert {path.name for path in (REPOSITORY / "examples").glob("*.py")} == {
        path.split("/")[1] for path in named if path.startswith("examples/")
    }
