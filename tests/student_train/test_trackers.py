"""Weights & Biases without a network: offline all of it lies in the run folder, online without a key is refused."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from potstill.common.exit_codes import ERROR
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment with empty folders of one's own, whose only way to a server is a socket that must stay unused."""
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        yield {
            "HOME": str(tmp_path / "home"),
            "TMPDIR": str(tmp_path / "tmp"),
            **dict.fromkeys(("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "https_proxy", "http_proxy"), url),
            "NO_PROXY": "",
            "POTSTILL_TEST": str(tmp_path),
        }
        with pytest.raises(BlockingIOError):
            server.accept()


def processes_of(tmp_path: Path) -> list[str]:
    """Command lines of the processes that carry the mark of this test in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("POTSTILL_TEST") == str(tmp_path):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue  # ended meanwhile, or another user's
    return found


def test_wandb_offline_stays_in_the_run_folder(stores, tmp_path: Path, outside: dict[str, str]) -> None:
    run = tmp_path / "run"
    before = set(tmp_path.iterdir())
    for max_steps in (2, 4):
        tree = tiny.config_tree(stores, run, logging={"wandb": "offline"}, run={"max_steps": max_steps})
        assert run_ranks(workers.train_elsewhere, tree, outside, world=2)[0]["steps"] == max_steps
        assert not processes_of(tmp_path)
    first, second = sorted((run / "wandb").glob("offline-run-*"))
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2], "a resumed run continues under its id"
    for folder in (first, second):
        [written] = folder.glob("run-*.wandb")
        content = written.read_bytes()
        for figure in (b"train/loss", b"train/agreement", b"eval/heldout_loss"):
            assert figure in content
    assert set(tmp_path.iterdir()) - before == {run}
    assert not list(Path(outside["HOME"]).iterdir()) and not list(Path(outside["TMPDIR"]).iterdir())


@pytest.mark.slow
def test_wandb_online_without_a_key_is_refused_and_asks_nobody(stores, tmp_path: Path, outside) -> None:
    tree = tiny.config_tree(stores, tmp_path / "run", logging={"wandb": "online"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    hidden = ("RANK", "WORLD_SIZE", "WANDB_API_KEY", "WANDB_MODE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | outside
    command = [sys.executable, "-m", "potstill.student_train", "--config", str(tmp_path / "run.yaml")]
    # On a terminal, where wandb would ask: nobody ever answers here.
    ours, theirs = pty.openpty()
    with open(theirs, "rb", buffering=0) as terminal, open(ours, "rb", buffering=0) as screen:
        process = subprocess.Popen(command, env=environment, stdin=terminal, stdout=terminal, stderr=terminal)
        terminal.close()
        text = b""
        try:
            while part := screen.read(4096):
                text += part
        except OSError:
            pass  # how Linux says that the other side of a terminal is closed
        finally:
            process.kill()
    assert process.wait() == ERROR, text
    last = text.decode().strip().splitlines()[-1]
    assert "WANDB_API_KEY" in last and "offline" in last and b"Traceback" not in text
    assert not (tmp_path / "run").exists()
    assert not processes_of(tmp_path)
