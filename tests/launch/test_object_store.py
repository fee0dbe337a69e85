"""The way of the data wholly on object storage: a local S3 server, the real commands, only run folders on disk."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from potstill.storage import StoreReader

pytest.importorskip("obstore")
moto = pytest.importorskip("moto.server")

STUDENT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Variables with which the client's own chain finds a fresh server on loopback; it holds one empty bucket."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        url = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT"), timeout=10)
        yield {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "s3cr3t-value-of-the-test",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": url,
        }
    finally:
        server.stop()


def potstill(environment: dict[str, str], *words: str, code: int = 0) -> str:
    """Run one command that must end with `code`; returns what it printed on both streams."""
    ended = subprocess.run(
        [sys.executable, "-m", "potstill.launch", *words],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
    )
    assert ended.returncode == code, f"{words} ended with {ended.returncode}:\n{ended.stdout}"
    return ended.stdout


def train_words(data: str, targets: str, run: Path) -> list[str]:
    groups = {"model.config": json.dumps(STUDENT), "data.targets": json.dumps({"teacher": targets})}
    curriculum = json.dumps([{"targets": "teacher", "alpha": 0.5}])
    return [
        *("train", "--tokens", data, "--output", str(run), "--steps", "3", "--num-ranks", "1", "--set"),
        *(f"{key}={value}" for key, value in groups.items()),
        *("data.global_batch_rows=2", "data.micro_batch_rows=2", f"curriculum={curriculum}", "logging.every_steps=1"),
    ]


def losses(run: Path) -> list[float]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [loss for line in lines if line["kind"] == "train" for loss in line["step_losses"]]


def test_the_whole_way_on_an_object_store(
    environment: dict[str, str], data: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.teacher_dump.tiny import save_llama

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    teacher = str(save_llama(tmp_path / "teacher", vocab_size=StoreReader(data / "train").spec.vocab_size))
    shape = ["--row-length", "32", "--rows-per-unit", "4", "--heldout-fraction", "0.2"]
    there = "s3://bucket/a folder/data"
    potstill(
        environment, "prepare", "--input", str(text), "--output", there, "--tokenizer", str(data / "tokenizer"), *shape
    )
    assert StoreReader(f"{there}/train").num_rows == StoreReader(data / "train").num_rows

    tokens, targets, here = f"{there}/train", "s3://bucket/targets", tmp_path / "targets"
    dump = ["dump", "--teacher", teacher, "--k", "8", "--tokens", tokens]
    potstill(environment, *dump, "--output", targets, "--set", "seal=false")
    status = potstill(environment, "status", targets, "--json", code=3)  # complete, but not sealed
    assert json.loads(status.splitlines()[-1])["missing"] == 0
    potstill(environment, "seal", targets)
    potstill(environment, "verify", targets, "--deep")
    potstill(environment, *dump, "--output", str(here))
    assert StoreReader(targets).digest == StoreReader(here).digest

    cache = tmp_path / "cache"
    potstill(environment, *train_words(tokens, targets, tmp_path / "far"), f"data.cache_dir={cache}")
    assert list(cache.glob("*.batch")), "nothing of the two stores was kept"
    (tmp_path / "tmp").mkdir()
    potstill({**environment, "TMPDIR": str(tmp_path / "tmp")}, *train_words(tokens, str(here), tmp_path / "near"))
    assert not list(tmp_path.glob("tmp/potstill-*/*.batch")), "rows are kept where a folder is named"
    assert len(losses(tmp_path / "far")) == 3
    assert losses(tmp_path / "far") == losses(tmp_path / "near")
    secret = environment["AWS_SECRET_ACCESS_KEY"]
    written = [path.read_bytes() for path in (tmp_path / "far").rglob("*") if path.is_file()]
    assert written
    assert not any(secret.encode() in content for content in written)
