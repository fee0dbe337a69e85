"""Stages run in the order of their needs, are not run twice, and leave no process behind when one fails."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from potstill.common.errors import UserError
from potstill.common.jobs import Job, JobRunner
from potstill.common.processes import start


def script(folder: Path, name: str, code: str, *, needs: tuple[str, ...] = (), slots: int = 1) -> Job:
    """A job that runs `code` in a fresh interpreter; it is done when the file of its name is there."""
    marker = folder / name
    text = f"import time, os, pathlib\nmarker = pathlib.Path({str(marker)!r})\n{code}"
    return Job(name=name, command=("python", "-c", text), is_done=marker.exists, needs=needs, slots=slots)


def runner(folder: Path, jobs: list[Job], shown: list[str], *, slots: int = 2) -> JobRunner:
    return JobRunner(
        jobs,
        starter=lambda words, output: start([sys.executable, *words], output=output),
        slots=slots,
        log_folder=folder / "logs",
        show=shown.append,
    )


TOUCH = "marker.touch()"


def test_needs_are_kept_and_what_can_runs_together(tmp_path: Path) -> None:
    wait_for = "while not (marker.parent / '{0}.up').exists(): time.sleep(0.01)\n"
    up = "(marker.parent / (marker.name + '.up')).touch()\n"
    jobs = [
        script(tmp_path, "left", up + wait_for.format("right") + TOUCH),
        script(tmp_path, "right", up + wait_for.format("left") + TOUCH),
        script(tmp_path, "last", "assert (marker.parent / 'left').exists()\n" + TOUCH, needs=("left", "right")),
    ]
    shown: list[str] = []
    made = runner(tmp_path, jobs, shown)
    made.run()
    assert set(made.seconds) == {"left", "right", "last"}


def test_a_wide_stage_runs_alone(tmp_path: Path) -> None:
    busy = tmp_path / "busy"
    alone = f"b = pathlib.Path({str(busy)!r})\nassert not b.exists()\nb.touch()\ntime.sleep(0.2)\nb.unlink()\n" + TOUCH
    runner(tmp_path, [script(tmp_path, name, alone, slots=2) for name in ("a", "b")], []).run()


def test_done_jobs_are_left_out(tmp_path: Path) -> None:
    count = "with open(marker.with_suffix('.count'), 'a') as f: f.write('x')\n" + TOUCH
    jobs = [script(tmp_path, "a", count), script(tmp_path, "b", count, needs=("a",))]
    runner(tmp_path, jobs, []).run()
    (tmp_path / "b").unlink()
    shown: list[str] = []
    runner(tmp_path, jobs, shown).run()
    assert (tmp_path / "a.count").read_text() == "x"
    assert (tmp_path / "b.count").read_text() == "xx"
    assert "a: done before" in shown


def test_failure_names_the_stage_and_shows_its_last_lines(tmp_path: Path) -> None:
    sleeper = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    wait = f"while not os.path.exists({str(tmp_path / 'pid')!r}): time.sleep(0.01)\nraise SystemExit('no such text')"
    jobs = [
        script(tmp_path, "slow", sleeper),
        script(tmp_path, "bad", wait),
        script(tmp_path, "next", TOUCH, needs=("bad",)),
    ]
    with pytest.raises(UserError, match=r"(?s)job bad ended with code 1.*no such text.*repeat the command"):
        runner(tmp_path, jobs, []).run()
    assert not (tmp_path / "next").exists()
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_stage_that_says_0_without_its_output_has_failed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ended with code 0 but its output is not complete"):
        runner(tmp_path, [script(tmp_path, "liar", "pass")], []).run()
