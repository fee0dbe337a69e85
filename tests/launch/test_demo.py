"""The demo, whole and tiny: every stage runs, a killed one goes on, a finished one costs nothing to repeat."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from potstill.common.errors import UserError
from potstill.launch.cli import main
from potstill.launch.demo import run_demo
from potstill.launch.demo_corpus import library_modules, write_corpus
from potstill.launch.demo_plan import FULL, QUICK, make_stages
from potstill.launch.demo_report import MODELS

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def demo_process(folder: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "potstill.launch", "demo", "--quick", "--output", str(folder)]
    with log.open("ab") as sink:
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=sink, stderr=sink, start_new_session=True)


def wait_for(log: Path, text: str, process: subprocess.Popen[bytes], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, f"no {text!r} after {seconds} s:\n{log.read_text()[-3000:]}"
        time.sleep(0.05)


def children_of_the_demo(folder: Path) -> list[str]:
    """Command lines of processes that were started with the folder in their environment's current command."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
            files = [os.readlink(link) for link in (entry / "fd").iterdir()]
        except OSError:
            continue
        if int(entry.name) != os.getpid() and any(str(folder) in name for name in [words, *files]):
            found.append(words)
    return found


@pytest.mark.timeout(420)  # some 25 s of work; the rest is patience with a busy machine
def test_killed_in_the_middle_it_goes_on_and_repeated_it_has_nothing_to_do(tmp_path: Path) -> None:
    folder, log = tmp_path / "demo folder", tmp_path / "log"  # a space in the name must not matter
    log.touch()
    first = demo_process(folder, log)
    try:
        wait_for(log, "train-teacher: done in", first, seconds=150)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        deadline = time.monotonic() + 20
        while children_of_the_demo(folder) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert children_of_the_demo(folder) == []
        before = json.loads((folder / "runs" / "teacher" / "done.json").read_text())

        second = demo_process(folder, log)
        try:
            assert second.wait(timeout=170) == 0, log.read_text()[-3000:]
        finally:
            second.kill()
    finally:
        first.kill()
    said = log.read_text()
    assert "prepare: done before" in said
    assert "train-teacher: done before" in said
    assert json.loads((folder / "runs" / "teacher" / "done.json").read_text()) == before
    check_report(folder, said)

    began = time.monotonic()
    third = demo_process(folder, log)
    assert third.wait(timeout=30) == 0
    assert time.monotonic() - began < 10
    repeated = log.read_text()[len(said) :]
    assert "$ potstill" not in repeated
    assert repeated[repeated.index("model ") :] == said[said.index("model    ") :]


def check_report(folder: Path, said: str) -> None:
    """The table says what the files say."""
    for name in MODELS:
        figures = json.loads((folder / "eval" / f"{name}.json").read_text())
        line = next(line for line in said.splitlines() if line.startswith(f"{name} ") and "  " in line)
        assert f"{figures['num_parameters']:,}" in line
        assert f"{figures['heldout_loss']:.4f}" in line
    manifest = json.loads((folder / "targets" / "train" / "manifest.json").read_text())
    assert f"{manifest['num_bytes'] / manifest['num_tokens']:.1f} bytes/token" in said
    labels, distilled = (
        json.loads((folder / "eval" / f"{name}.json").read_text())["heldout_loss"]
        for name in ("labels-only", "distilled")
    )
    word = "ahead of" if distilled < labels else "BEHIND"
    assert f"{abs(labels - distilled):.4f} nats {word}" in said
    # Each line that it tells people to go on with is understood by the command.
    from potstill.launch.cli import parse

    advice = said[said.index("Go on with:") :].splitlines()[1:]
    assert len(advice) >= 4
    for line in advice:
        assert parse(shlex.split(line)[1:])


def test_the_students_differ_in_the_curriculum_only(tmp_path: Path) -> None:
    from potstill.launch.demo_plan import student_config

    labels, distilled = (student_config(FULL, tmp_path, distilled=flag) for flag in (False, True))
    assert labels["run"] | {"name": "", "output_dir": ""} == distilled["run"] | {"name": "", "output_dir": ""}
    for key in ("model", "optimizer", "schedule", "checkpoint"):
        assert labels[key] == distilled[key]
    assert labels["data"].items() <= distilled["data"].items()
    assert set(distilled) - set(labels) == {"objective", "curriculum"}


@pytest.mark.parametrize("size", [FULL, QUICK], ids=["full", "quick"])
def test_every_stage_needs_stages_before_it(size: object, tmp_path: Path) -> None:
    known: set[str] = set()
    for stage in make_stages(size, tmp_path, num_ranks=2):  # type: ignore[arg-type]
        assert set(stage.needs) <= known, stage.name
        known.add(stage.name)


def test_the_corpus_is_the_same_each_time_and_bounded(tmp_path: Path) -> None:
    first = write_corpus(tmp_path / "a.jsonl", max_bytes=200_000)
    assert 200_000 <= first < 300_000
    assert write_corpus(tmp_path / "b.jsonl", max_bytes=200_000) == first
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    documents = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert all(re.fullmatch(r"[\w./-]+\.py", document["id"]) and document["text"] for document in documents)


def test_a_library_without_source_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    assert list(library_modules(tmp_path / "lib")) == []
    with pytest.raises(UserError, match="no source of the standard library"):
        write_corpus(tmp_path / "c.jsonl", max_bytes=10, folder=tmp_path / "lib")
    assert list(tmp_path.glob("*.jsonl*")) == []


def test_a_folder_that_is_not_a_demo_is_never_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("dear")
    assert main(["demo", "--output", str(tmp_path), "--force"]) == 1
    assert "holds no demo" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "dear"


def test_another_size_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text("{}")
    with pytest.raises(UserError, match="demo of other sizes"):
        run_demo(tmp_path, QUICK, force=False)
