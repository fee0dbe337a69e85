"""A data set named by its hub name: streamed, and pinned by its commit. The hub is a small server on the loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.teacher_dump.hub import serve

pytest.importorskip("datasets")
OLD, NEW = "a" * 40, "b" * 40
CODE = """
import json, sys
from potstill.teacher_dump import DatasetInput
from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.hf_datasets import open_dataset
from potstill.teacher_dump.records.text import PlainText

found = []
for revision in json.loads(sys.argv[1]):
    source = open_dataset(DatasetInput(path="org/pot", revision=revision), kind=PlainText("text"), max_bad_lines=0)
    texts = [document.record.text for document in source.read()]
    rest = [document.record.text for document in source.read(start=Place(1, 1))]
    found.append({"texts": texts, "rest": rest, "digest": source.digest, **source.info()["dataset"]})
print(json.dumps(found))
"""


def test_a_hub_data_set_is_streamed_and_pinned_by_its_commit(tmp_path: Path) -> None:
    files = {"README.md": b"---\nlicense: mit\n---\n"}
    for part in range(2):
        lines = [json.dumps({"text": f"text {part} {number}"}) + "\n" for number in range(3)]
        files[f"train-{part}.jsonl"] = "".join(lines).encode()
    commits = [OLD]
    with serve("org/pot", files, commits=commits) as (address, seen):
        # The library reads its settings when it is imported, so that another hub needs another process.
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub")}
        environment.pop("HF_HUB_OFFLINE", None)

        def opened(*revisions: str | None) -> list[dict[str, Any]]:
            command = [sys.executable, "-c", CODE, json.dumps(revisions)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
            assert done.returncode == 0, done.stderr
            result: list[dict[str, Any]] = json.loads(done.stdout)
            return result

        (first,) = opened(None)
        commits.append(NEW)
        moved_on, named = opened(None, OLD)
    assert first["texts"] == [f"text {part} {number}" for part in range(2) for number in range(3)]
    assert first["rest"] == ["text 1 1", "text 1 2"]
    assert (first["name"], first["split"], first["revision"]) == ("org/pot", "train", OLD)
    assert moved_on["revision"] == NEW and moved_on["digest"] != first["digest"]
    assert named == first
    assert any(f"resolve/{OLD}/train-1.jsonl" in request for request in seen)
    # Nothing is kept: the cache holds no copy of the data.
    assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file() and b"text 1 1" in path.read_bytes()]
