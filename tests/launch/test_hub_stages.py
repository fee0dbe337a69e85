"""Stages fed from a hub on the loopback: a teacher by its hub id, and a run whose stores lie in a data set."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.storage import StoreReader
from potstill.student_train.run.checkpoint_files import MANIFEST
from tests.hub_server import Hub, serve_hub
from tests.student_train import tiny
from tests.teacher_dump.tiny import make_tokens, save_llama

pytestmark = pytest.mark.slow


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve_hub() as served:
        served.speak_to(monkeypatch, tmp_path / "home")
        yield served


def potstill(*words: str) -> str:
    command = [sys.executable, "-m", "potstill.launch", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_a_teacher_by_its_hub_id_writes_what_its_folder_does(hub: Hub, tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")
    tokens = make_tokens(tmp_path / "tokens", [(16,), (9, 7)] * 4)
    commit = hub.add("models", "acme/teacher", {path.name: path.read_bytes() for path in model.iterdir()}).branches
    readers = []
    for name, teacher in (
        ("hub", ["teacher.model=acme/teacher", f"teacher.load_options.revision={commit['main']}"]),
        ("folder", [f"teacher.model={model}"]),
    ):
        settings = [*teacher, "teacher.check_tokenizer=false"]
        potstill("dump", "--tokens", str(tokens), "--output", str(tmp_path / name), "--set", *settings)
        readers.append(StoreReader(tmp_path / name))
    by_id, by_folder = (reader.spec.teacher or {} for reader in readers)
    assert by_id["id"] == f"acme/teacher@{commit['main']}"
    assert by_id["weights_digest"] == by_folder["weights_digest"]
    for one, other in zip(readers[0].rows(range(8)), readers[1].rows(range(8)), strict=True):
        assert (one.targets.logprobs == other.targets.logprobs).all()  # type: ignore[union-attr]
    assert any(f"/acme/teacher/resolve/{commit['main']}/model.safetensors" in line for line in hub.seen)


def test_a_run_reads_its_stores_from_a_data_set(hub: Hub, tmp_path: Path) -> None:
    """Step for step the losses of the run on the local copies, and the digests of the same stores in its checkpoint."""
    stores = tiny.write_all(tmp_path / "stores")
    root = tmp_path / "stores"
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    commit = hub.add("datasets", "acme/stores", files).branches["main"]
    losses: list[list[Any]] = []
    for name, place in (("local", str), ("hub", lambda path: f"hf://datasets/acme/stores@{commit}/{path.name}")):
        tree = tiny.config_tree(stores, tmp_path / name, run={"max_steps": 4})
        data = tree["data"]
        for key in ("tokens", "heldout", "heldout_targets"):
            data[key] = place(Path(data[key]))
        for key in ("targets", "scores"):
            data[key] = {one: place(Path(path)) for one, path in data[key].items()}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
        potstill("train", "--config", str(tmp_path / f"{name}.yaml"))
        lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        losses.append([(record["step"], record["loss"]) for record in records if "loss" in record])
    assert len(losses[0]) >= 2 and losses[0] == losses[1]
    manifests = [next((tmp_path / name).glob(f"checkpoints/step_*/{MANIFEST}")) for name in ("local", "hub")]
    pinned = [json.loads(path.read_text(encoding="utf-8"))["stores"] for path in manifests]
    assert pinned[0] == pinned[1] and len(pinned[0]) == 3
