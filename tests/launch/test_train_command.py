"""`potstill train` as a person sees it: one form of output for any number of ranks, one last line that says what to do.

How the end of ranks is judged is tested with small processes in the place of ranks; what real ranks print, with real
ones (few: each start costs seconds of imports).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.common.exit_codes import DONE, ERROR, PREEMPTED
from potstill.launch import train_command
from potstill.launch.cli import main
from tests.student_train import tiny

BOUND_SECONDS = 300  # of one start with real ranks, which takes ten on a quiet machine

# What a rank is told, and what it may do in return; argv[1] is --config=FILE.
PROBE = """
import json, os, pathlib, signal, sys, time
from potstill.common.errors import UserError
from potstill.student_train.run.rank_report import FOLDER_VARIABLE, LOG_VARIABLE, write_error, write_summary
from potstill.student_train.run.summary import TrainSummary
reports, rank = pathlib.Path(os.environ[FOLDER_VARIABLE]), int(os.environ["RANK"])
import yaml
run = pathlib.Path(yaml.safe_load(pathlib.Path(sys.argv[1].partition("=")[2]).read_text())["run"]["output_dir"])
assert pathlib.Path(os.environ[LOG_VARIABLE]).parent == run / "logs"
def ends(status, marked):
    if rank == 0:
        write_summary(reports, TrainSummary(status, run, 3, 8, 384, 17, 1.0, {}, {"heldout_loss": 2.0}))
        if marked:
            (run / "done.json").write_text("{}")
    sys.exit(0 if status == "done" else 75)
(reports / f"pid{rank}").write_text(str(os.getpid()))
def after_rank_1():  # as in a collective call, which fails when the other rank has gone
    path = reports / "pid1"
    while not (path.exists() and path.read_text() and not pathlib.Path("/proc", path.read_text()).exists()):
        time.sleep(0.01)
def fails(error, foreseen):
    write_error(reports, rank=rank, error=error, foreseen=foreseen)
    sys.exit(1)
"""


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.write_all(tmp_path_factory.mktemp("stores"))


def write_config(stores: dict[str, Path], folder: Path, **changes: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tiny.config_tree(stores, folder / "run", **changes)))
    return path


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("ends('done', True)", DONE, ""),
        ("ends('signal SIGTERM', False)", PREEMPTED, ""),
        ("ends('done', False)", ERROR, "left no mark of its end"),
        ("fails(UserError('lower optimizer.lr'), True)", ERROR, "error: all 2 ranks: lower optimizer.lr; log: "),
        (
            "fails(UserError('no room') if rank else RuntimeError('peer is gone'), bool(rank))",
            ERROR,
            "error: rank 1: no room; log: ",
        ),
        (
            "os.kill(os.getpid(), signal.SIGKILL) if rank else (after_rank_1(), fails(RuntimeError('gone'), False))",
            ERROR,
            "error: rank 1 was ended by SIGKILL (the system does so when memory runs out",
        ),
        ("sys.exit(3) if rank else ends('done', True)", ERROR, "error: rank 1 ended with code 3 and left no message"),
        ("fails(KeyError('x'), False)", ERROR, "not foreseen: all 2 ranks: KeyError: 'x'; this is a defect"),
    ],
)
def test_the_end_of_ranks_is_judged_by_what_they_left(
    stores, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, what: str, code: int, words: str
) -> None:
    (tmp_path / "probe_train.py").write_text(PROBE + what + "\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    monkeypatch.setattr(train_command, "RANK_MODULE", "probe_train")
    config = write_config(stores, tmp_path)
    assert main(["train", "--config", str(config), "--num-ranks", "2", "--json"]) == code
    captured = capsys.readouterr()
    if code == ERROR:
        assert captured.out == ""
        last = captured.err.splitlines()[-1]
        assert last.startswith("potstill train: error: ") and words in last, captured.err
        log = Path(last.rpartition("log: ")[2])
        assert log.is_file() and log.parent == tmp_path / "run" / "logs"
    else:
        assert "error" not in captured.err
        assert captured.out.startswith(f"run {tmp_path / 'run'}: ") and "heldout_loss 2.0000" in captured.out
        assert json.loads(captured.out.splitlines()[-1])["steps"] == 3


def test_force_is_done_by_the_command_and_not_passed_on(
    stores, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that deleted the run would delete the log that it writes to."""
    told = "assert not yaml.safe_load(pathlib.Path(sys.argv[1].partition('=')[2]).read_text())['run']['force']\n"
    (tmp_path / "probe_train.py").write_text(PROBE + told + "ends('done', True)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    monkeypatch.setattr(train_command, "RANK_MODULE", "probe_train")
    config = write_config(stores, tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("run: {}")
    (run / "old").touch()
    assert main(["train", "--config", str(config), "--num-ranks", "2", "--force"]) == DONE
    assert sorted(path.name for path in run.iterdir()) == ["done.json", "logs"]
    assert len(list((run / "logs").iterdir())) == 1


def environment() -> dict[str, str]:
    """Ours without what silences DeepSpeed in tests: the noise is what is looked for."""
    kept = {name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "PYTHONWARNINGS")}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def command(config: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "potstill.launch", "train", "--config", str(config), *words]


def form(text: str, run: Path) -> list[str]:
    """Output without what differs between two runs: figures and the folder."""
    return [re.sub(r"\d([\d.,]*\d)?", "#", line.replace(str(run), "RUN")) for line in text.splitlines()]


LOG_LINE = re.compile(r"\d\d:\d\d:\d\d [IW] (\[rank 0\] )?\S|train: ")


@pytest.mark.xdist_group("ranks")
@pytest.mark.timeout(5 * BOUND_SECONDS)
def test_one_and_two_ranks_print_the_same_form_and_no_noise(stores, tmp_path: Path) -> None:
    forms = []
    for num_ranks in (1, 2):
        folder = tmp_path / str(num_ranks)
        folder.mkdir()
        config = write_config(stores, folder, run={"max_steps": 2}, zero_stage=1)
        words = command(config, "--num-ranks", str(num_ranks), "--json")
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=BOUND_SECONDS, env=environment(), check=False
        )
        assert done.returncode == DONE, done.stderr
        *summary, last = done.stdout.splitlines()
        assert json.loads(last)["status"] == "done"
        forms.append(form("\n".join(summary), folder / "run"))
        assert all(LOG_LINE.match(line) for line in done.stderr.splitlines()), done.stderr
        assert "step 2/2 loss" in done.stderr and "train: 2/2 steps" in done.stderr
        (log,) = (folder / "run" / "logs").iterdir()
        assert str(log) in done.stderr
        text = log.read_text()
        assert "step 2/2 loss" in text
        if not Path("/dev/nvidiactl").exists():
            assert text.count("Setting accelerator to CPU") == num_ranks, text
    assert forms[0] == forms[1]
    assert forms[0][0].startswith("run RUN: done, step # of #, # tokens, ")


@pytest.mark.slow  # what is made of it stands above, with small processes in the place of ranks
@pytest.mark.xdist_group("ranks")
@pytest.mark.timeout(5 * BOUND_SECONDS)
def test_an_error_of_all_ranks_is_the_last_line_and_stands_there_once(stores, tmp_path: Path) -> None:
    config = write_config(stores, tmp_path, run={"max_steps": 100}, optimizer={"lr": 0.5}, spike_policy="stop")
    words = command(config, "--num-ranks", "2", "--set", "spike_window=8", "spike_sigma=0.1")
    done = subprocess.run(words, capture_output=True, text=True, timeout=BOUND_SECONDS, env=environment(), check=False)
    assert (done.returncode, done.stdout) == (ERROR, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("potstill train: error: all 2 ranks: step ") and "lower optimizer.lr" in last
    assert last.endswith(f"; log: {next((tmp_path / 'run' / 'logs').iterdir())}")
    assert done.stderr.count("is a loss spike") == 1 and "Traceback" not in done.stderr


@pytest.mark.xdist_group("ranks")
@pytest.mark.timeout(5 * BOUND_SECONDS)
def test_a_killed_rank_is_named_and_a_stopped_run_goes_on(stores, tmp_path: Path) -> None:
    config = write_config(stores, tmp_path, run={"max_steps": 100_000})
    words = command(config, "--num-ranks", "2")

    def started() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=(tmp_path / "err").open("w"), text=True, env=environment()
        )
        end = time.monotonic() + BOUND_SECONDS
        while "loss" not in (tmp_path / "err").read_text().partition("float64")[2] and time.monotonic() < end:
            assert process.poll() is None, (tmp_path / "err").read_text()
            time.sleep(0.05)
        return process

    process = started()
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2, "a process for each rank and none beside them"
        os.kill(int(children[1]), signal.SIGKILL)
        assert process.wait(timeout=BOUND_SECONDS) == ERROR
    finally:
        process.kill()
    assert (
        (tmp_path / "err").read_text().splitlines()[-1].startswith("potstill train: error: rank 1 was ended by SIGKILL")
    )
    assert not any(Path(f"/proc/{child}").exists() for child in children)

    process = started()
    try:
        process.terminate()
        out, _ = process.communicate(timeout=BOUND_SECONDS)
    finally:
        process.kill()
    assert process.returncode == PREEMPTED, (tmp_path / "err").read_text()
    assert out.startswith(f"run {tmp_path / 'run'}: signal SIGTERM, step ")
    assert out.splitlines()[-1] == "  start the same command again to continue"
    assert list((tmp_path / "run" / "checkpoints").glob("step_*/potstill.json"))
