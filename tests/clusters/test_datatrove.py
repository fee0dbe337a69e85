"""docs/cluster/datatrove.md as it stands there; the real package in the slow tests."""

from __future__ import annotations

import ast
import importlib
import os
import pickle
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from potstill.storage import StoreReader, StoreStatus, store_status
from potstill.teacher_dump import DumpConfig, DumpStep, ScoreConfig, ScoreStep, SealStep, dump
from tests.clusters import working_folder
from tests.clusters.pages import blocks, commands
from tests.clusters.working_folder import dump_config, environment, make_folder, shell, started, wait_until
from tests.teacher_dump.tiny import make_tokens, save_llama

HAS_DATATROVE = find_spec("datatrove") is not None
needs_datatrove = pytest.mark.skipif(not HAS_DATATROVE, reason="datatrove is not installed: potstill[datatrove]")
SCRIPTS = {block.text.splitlines()[0].removeprefix("# "): block.text for block in blocks("datatrove", "python")}


def test_a_step_is_pickled_by_a_name_that_every_process_knows(tmp_path: Path) -> None:
    tokens, model = make_tokens(tmp_path / "tokens"), save_llama(tmp_path / "model")
    teacher = {"model": model, "batch_rows": 2, "check_tokenizer": False}
    config = DumpConfig(tokens=tokens, output=tmp_path / "out", teacher=teacher)
    pickled = pickle.dumps(DumpStep(config))
    assert b"potstill.teacher_dump.steps" in pickled and b"__main__" not in pickled
    step = pickle.loads(pickled)
    assert step == DumpStep(config)
    waiting = step(["a document"], 0, 2)
    assert not (tmp_path / "out").exists()  # as any step: nothing is done before somebody reads what comes out
    assert list(waiting) == ["a document"]
    assert list(step(None, 1, 2)) == []
    assert list(SealStep(str(tmp_path / "out"))(None, 0, 1)) == []
    dump(config.model_copy(update={"output": str(tmp_path / "calm")}))
    assert StoreReader(tmp_path / "out").digest == StoreReader(tmp_path / "calm").digest

    scores = ScoreConfig(tokens=tokens, output=tmp_path / "scores", model={"model": model, "check_tokenizer": False})
    score = pickle.loads(pickle.dumps(ScoreStep(scores)))
    assert list(score(["a document"], 0, 1)) == ["a document"]
    assert store_status(tmp_path / "scores").sealed


def test_the_scripts_of_the_page_name_what_exists() -> None:
    assert {f"python {name}" for name in SCRIPTS} <= set(commands("datatrove"))
    for name, text in SCRIPTS.items():
        compile(text, name, "exec")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("potstill"):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names)


def written(folder: Path, script: str, **lines: str) -> Path:
    """A script of the page in the folder; of the lines `NAME = ...` of a site, those that are given are replaced."""
    text = SCRIPTS[script]
    for name, value in lines.items():
        before = next(line for line in text.splitlines() if line.startswith(f"{name} = "))
        text = text.replace(before, f"{name} = {value}")
    (folder / script).write_text(text)
    return folder / script


def committed(store: Path) -> int:
    return store_status(store).committed if (store / "run.json").exists() else 0


def digest_of_a_calm_dump(folder: Path) -> str:
    dump(dump_config(folder, "data/calm"))
    return StoreReader(folder / "data" / "calm").digest


def done(folder: Path) -> StoreStatus:
    return store_status(folder / "data" / "targets")


@needs_datatrove
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_local_executor_killed_in_the_middle(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, num_texts=2000, rows_per_unit=8)
    written(folder, "dump_here.py")
    lines = [line for line in commands("datatrove") if "dump_slurm" not in line]
    assert lines[0] == "python dump_here.py" and lines[1:] == ["potstill status data/targets"]
    with started(["bash", "-c", lines[0]], folder=folder, output=tmp_path / "killed.log") as process:
        wait_until(lambda: committed(folder / "data" / "targets") >= 4, seconds=120, what="units", alive=process)
        os.killpg(process.pid, signal.SIGKILL)
    assert 0 < done(folder).missing < done(folder).num_units
    for line in lines:
        code, text = shell(line, folder=folder, output=tmp_path / "again.log")
        assert code == 0, text
    assert "resuming the store" in text and "sealed" in text
    assert StoreReader(folder / "data" / "targets").digest == digest_of_a_calm_dump(folder)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_signal_that_stopped_a_step_reaches_the_executors_handler(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, num_texts=2500, rows_per_unit=8)
    # What datatrove's executor for SLURM does: it asks for another turn in its handler, and ends.
    script = (
        "import signal, sys\n"
        "from potstill.teacher_dump import DumpConfig, DumpStep\n"
        "def requeue(number, frame):\n    print('asked for another turn', flush=True)\n    sys.exit(15)\n"
        "signal.signal(signal.SIGUSR1, requeue)\n"
        "config = DumpConfig(tokens='data/train', output='data/targets', teacher={'model': 'models/teacher'})\n"
        "list(DumpStep(config)(None, 0, 2))\n"
    )
    (folder / "step.py").write_text(script)
    output = tmp_path / "stopped.log"
    with started([sys.executable, "step.py"], folder=folder, output=output, env=environment()) as process:
        wait_until(lambda: committed(folder / "data" / "targets"), seconds=90, what="a unit", alive=process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == 15, output.read_text()
    assert "asked for another turn" in output.read_text()
    assert done(folder).missing
    assert working_folder.run([sys.executable, "step.py"], folder=folder, output=tmp_path / "again.log")[0] == 0
